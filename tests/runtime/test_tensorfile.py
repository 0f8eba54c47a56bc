from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from swiftvideo.runtime import tensorfile
from swiftvideo.runtime.errors import UsageError

ARRAYS: dict[str, Any] = {
    "bytes": np.arange(3, dtype=np.uint8),
    "half": np.linspace(0, 1, 5, dtype=np.float16),
    "b/float": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "count": np.array([-1], np.int64),
    "none": np.zeros((1, 0, 4), np.float32),
}


def test_arrays_and_text_come_back(tmp_path: Path) -> None:
    tensorfile.write(tmp_path / "x", "some-1", '{"a": "\\u00fc"}', ARRAYS)
    text, arrays = tensorfile.read(tmp_path / "x", "some-1")
    assert text == '{"a": "\\u00fc"}' and arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(arrays[name], value)
    tensorfile.write(tmp_path / "x", "some-1", "", {})
    assert tensorfile.read(tmp_path / "x", "some-1") == ("", {})


def test_the_file_is_one_that_the_library_reads_and_its_arrays_are_aligned(tmp_path: Path) -> None:
    tensorfile.write(tmp_path / "x", "some-1", "text", ARRAYS)
    for name, value in load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(value, ARRAYS[name])
    data = (tmp_path / "x").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 8 == 0 and data[begin:].startswith(np.array([-1], np.int64).tobytes())


def test_every_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tensorfile.write(path, "some-1", "text", {name: ARRAYS[name] for name in ("half", "bytes", "none")})
    data = path.read_bytes()
    for at in range(8 * len(data)):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(UsageError, match=r"^\S*x (is not what was saved .*|has format .*)save it again"):
            tensorfile.read(path, "some-1")


def test_names_shapes_and_dtypes_count_too(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tensorfile.write(path, "some-1", "text", {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int16)})
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        a, b = file.get_tensor("a"), file.get_tensor("b")
    for arrays in (
        {"a": a, "c": b},
        {"a": a.T.copy(), "b": b},
        {"a": a, "b": b.view(np.float16)},
        {"a": a},
        {"a": a, "b": b, "c": b[:0]},
    ):
        save_file(arrays, path, metadata)
        with pytest.raises(UsageError, match=r"x is not what was saved .its SHA-256 is another.: save it"):
            tensorfile.read(path, "some-1")
    save_file({"a": a, "b": b}, path, metadata)
    assert tensorfile.read(path, "some-1")[0] == "text"


def test_a_file_that_was_renamed_to_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tensorfile.write(path, "some-1", "text", {})
    path.write_bytes(path.read_bytes().replace(b"some-1", b"some-2"))
    with pytest.raises(UsageError, match="its SHA-256 is another"):
        tensorfile.read(path, "some-2")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"^\S*x has format None, not 'some-1': it is something else"),
        ({"format": "some-1"}, r"x is not what was saved \('text'\): save it again"),
        ({"format": "some-1", "text": ""}, r"x is not what was saved \('sha256'\): save it again"),
    ],
)
def test_a_file_without_our_metadata_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "x", metadata)
    with pytest.raises(UsageError, match=message):
        tensorfile.read(tmp_path / "x", "some-1")


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("BF16", [1], 2), ("F8_E4M3", [1], 1), ("F32", [0, 1 << 62], 0), ("F32", [1] * 70, 4)],
)
def test_arrays_that_numpy_cannot_hold_are_refused(
    tmp_path: Path, dtype: str, shape: list[int], size: int
) -> None:
    metadata = {"format": "some-1", "text": "", "sha256": ""}
    array = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, "a": array}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(UsageError, match=r"x is not what was saved .*save it again"):
        tensorfile.read(tmp_path / "x", "some-1")


def test_writing_copies_no_array(tmp_path: Path) -> None:
    arrays = {str(number): np.zeros(1 << 20, np.float32) for number in range(4)}
    tracemalloc.start()
    tensorfile.write(tmp_path / "x", "some-1", "", arrays)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < arrays["0"].nbytes / 4
