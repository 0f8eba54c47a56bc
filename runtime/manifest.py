"""A bundle's manifest: what is in the folder, verified.

A bundle is a folder with `manifest.json`, `tokenizer.json` and `onnx/*.onnx` with external data beside them. The
manifest lists every file's SHA-256 and size. `Manifest.read_file` hashes the very bytes that it returns, so what was
checked is what is loaded, even when the file changes meanwhile.

    manifest = Manifest.load(folder)
    model = manifest.read_file("onnx/denoise.onnx")
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from .errors import (
    BundleIntegrityError,
    BundleMissingError,
    BundleVersionError,
    OutOfMemoryError,
    SettingsError,
)
from .geometry import Geometry, PolicySettings
from .plain import PlainError, UnknownKeysError, decode, encode

SCHEMA = 1
"""The version of the bundle format that this package writes and reads."""

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
GRAPHS = ("text_encoder", "condition", "denoise", "inject", "decode", "decode_first")

LARGEST = 1 << 22
"""Bytes of a manifest, a hundred times those of a model with plans for every GPU."""

_BLOCK = 1 << 22
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: lower-case hexadecimal SHA-256 and size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise SettingsError(f"sha256 is {self.sha256!r}: 64 lower-case hexadecimal digits are needed")
        if not 0 <= self.size < 1 << 60:
            raise SettingsError(f"size is {self.size}: it must not be negative, nor beyond any disk")


@dataclass(frozen=True, slots=True)
class ScheduleInfo:
    """The noise schedule that was folded into the graphs (algorithm.md, section 1)."""

    timesteps: tuple[float, ...]
    """Times of the denoising steps, 0..1000, falling."""
    sigmas: tuple[float, ...]
    """Sigma of each of `timesteps`."""
    context_noise: float = 0.0
    """Time of the context pass."""
    shift: float = 5.0

    def __post_init__(self) -> None:
        if not self.timesteps or len(self.timesteps) != len(self.sigmas):
            raise SettingsError(
                f"schedule has {len(self.timesteps)} timesteps and {len(self.sigmas)} sigmas: "
                "as many of each, and at least one, are needed"
            )


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from: a kind such as "diffusers" or "random", and the checkpoint's SHA-256."""

    kind: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle holds. `folder` is where it was loaded from or saved to; the file itself does not name it."""

    model: str
    dtype: Literal["fp32", "fp16", "bf16"]
    geometry: Geometry
    policy: PolicySettings
    schedule: ScheduleInfo
    source: Source
    text_encoder: str
    files: Mapping[str, FileEntry]
    plans: tuple[Mapping[str, Any], ...] = ()
    schema: int = SCHEMA
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.schedule.timesteps) != self.geometry.steps:
            raise SettingsError(
                f"schedule has {len(self.schedule.timesteps)} steps and geometry.steps is {self.geometry.steps}: "
                "they must agree"
            )
        for name in self.files:
            _check_name(name)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read and check `folder`/manifest.json; the other files are checked when they are read.

        Raises:
            BundleMissingError: no such folder, or no manifest in it.
            BundleVersionError: another schema, or keys that this version does not know.
            BundleIntegrityError: not JSON, keys missing, or values of the wrong type or range.
            SettingsError: `folder` cannot be the name of one.
        """
        try:
            folder = Path(folder)
            path = folder / MANIFEST_NAME
            status = path.stat()
            odd = not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode)
            text = b"" if odd or status.st_size > LARGEST else path.read_bytes()
        except (TypeError, ValueError) as error:  # an object of another kind; a null byte
            raise SettingsError(f"bundle {folder!r} ({error}): give the name of a folder") from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleMissingError(
                f"no bundle at {str(folder)!r}: {path.name} is not there; "
                "make one with `swiftvideo export CHECKPOINT --out BUNDLE`"
            ) from error
        except OSError as error:
            raise BundleMissingError(f"{path} cannot be read: {error}; change its permissions") from error
        if odd:  # and without an end, it may be
            raise BundleMissingError(f"{path} is a pipe or a device; copy the whole bundle again")
        if status.st_size > LARGEST:
            raise BundleIntegrityError(
                f"{path} has {status.st_size} bytes and a manifest at most {LARGEST}; export the bundle again"
            )
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleIntegrityError(f"{path} is not JSON ({error}); export the bundle again") from error
        if not isinstance(data, dict):
            raise BundleIntegrityError(
                f"{path} holds {type(data).__name__}, not an object; export the bundle again"
            )
        schema = data.get("schema")
        if schema != SCHEMA or isinstance(schema, bool):
            raise BundleVersionError(
                f"{path} has schema {schema!r} and this version of swiftvideo reads {SCHEMA}: "
                "export the bundle again with this version, or install the version that wrote it"
            )
        data["folder"] = None
        manifest = _decoded(cls, data, str(path))
        return dataclasses.replace(manifest, folder=folder)

    def save(self, folder: str | Path) -> Manifest:
        """Write manifest.json into `folder` (made if needed), in one step; return the manifest bound to it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = encode(self)
        del data["folder"]
        text = json.dumps({"schema": data.pop("schema"), **data}, indent=1) + "\n"
        partial = folder / (MANIFEST_NAME + ".partial")
        partial.unlink(missing_ok=True)  # a killed process's, or a link, through which it would be written
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
        partial.replace(folder / MANIFEST_NAME)
        return dataclasses.replace(self, folder=folder)

    def has(self, name: str) -> bool:
        """Whether the bundle lists the file."""
        return name in self.files

    def read_file(self, name: str) -> memoryview:
        """Bytes of a listed file, read once, hashed, returned read-only.

        Raises:
            BundleMissingError: not listed, or not there.
            BundleIntegrityError: another size or another hash than the manifest's.
            OutOfMemoryError: no memory for the file.
        """
        entry, path = self._locate(name)
        try:
            data = bytearray(entry.size)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{path} needs {entry.size} bytes of memory, which are not there"
            ) from error
        view = memoryview(data)
        with _open(path) as file:
            filled = 0
            while filled < entry.size:
                count = file.readinto(view[filled:])  # type: ignore[attr-defined]
                if not count:
                    break
                filled += count
            if filled < entry.size or file.read(1):
                raise _wrong_size(path, entry)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _wrong_hash(path, entry)
        return view.toreadonly()

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, over the listed files' names and hashes: equal models have equal ones.

        What was compiled from them, plans and kernels, does not count.
        """
        own = sorted(item for item in self.files.items() if not item[0].startswith(("trt/", "kernels/")))
        lines = (f"{name} {entry.sha256}\n" for name, entry in own)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def check_sizes(self) -> None:
        """See that every listed file is there with its size, without reading any.

        Raises BundleMissingError, BundleIntegrityError.
        """
        for name in self.files:
            self._locate(name)

    def verify_all(self) -> None:
        """Hash every listed file without keeping it. Raises as `read_file`."""
        for name in self.files:
            entry, path = self._locate(name)
            if measure(path) != entry:
                raise _wrong_hash(path, entry)

    def _locate(self, name: str) -> tuple[FileEntry, Path]:
        if self.folder is None:
            raise BundleMissingError("the manifest belongs to no folder yet: save it or load it first")
        if name not in self.files:
            raise BundleMissingError(
                f"the bundle at {str(self.folder)!r} lists no {name!r}: it has {', '.join(sorted(self.files))}"
            )
        path = self.folder / name
        if not path.is_file():
            raise BundleMissingError(
                f"{path} is listed in the manifest and not there: copy the whole bundle again"
            )
        entry = self.files[name]
        if path.stat().st_size != entry.size:
            raise _wrong_size(path, entry)
        return entry, path


def settings_from(data: Any, where: str) -> PolicySettings:
    """Policy settings from the plain form that manifests have. Raises BundleError naming `where`."""
    return _decoded(PolicySettings, data, where)


def _decoded(cls: type[_T], data: Any, where: str) -> _T:
    try:
        return decode(cls, data, where)
    except UnknownKeysError as error:
        raise BundleVersionError(
            f"{error}; the bundle was written by a newer version of swiftvideo, install that one"
        ) from error
    except PlainError as error:
        raise BundleIntegrityError(f"{error}; export it again") from error
    except SettingsError as error:
        raise BundleIntegrityError(f"{where}: {error}") from error
    except RecursionError as error:
        raise BundleIntegrityError(f"{where} is nested too deeply; export it again") from error


def measure(path: str | Path) -> FileEntry:
    """SHA-256 and size of a file, read in blocks."""
    digest, size = hashlib.sha256(), 0
    with _open(Path(path)) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileEntry(digest.hexdigest(), size)


def measure_files(folder: str | Path, names: Iterable[str] | None = None) -> dict[str, FileEntry]:
    """Entries of `names` (posix, relative to `folder`), or of every file below `folder` but the manifest."""
    folder = Path(folder)
    if names is None:
        found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = [name for name in found if not name.startswith(MANIFEST_NAME)]
    return {name: measure(folder / name) for name in sorted(names)}


def _open(path: Path) -> typing.BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise BundleMissingError(f"{path} is not there: copy the whole bundle again") from error
    except OSError as error:
        raise BundleMissingError(f"{path} cannot be read: {error}; change its permissions") from error


def _wrong_size(path: Path, entry: FileEntry) -> BundleIntegrityError:
    return BundleIntegrityError(
        f"{path} does not have the {entry.size} bytes that the manifest lists: copy the bundle again"
    )


def _wrong_hash(path: Path, entry: FileEntry) -> BundleIntegrityError:
    return BundleIntegrityError(
        f"{path} was changed: its SHA-256 is not {entry.sha256[:12]}..., which the manifest lists; "
        "copy or export the bundle again"
    )


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or ":" in name
        or not name.isprintable()
        or str(path) != name
    ):
        raise SettingsError(f"file name {name!r}: a plain relative path inside the bundle is needed")
