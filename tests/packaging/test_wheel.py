"""What the wheel holds, and that the suite runs on what it claims to."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("sdk", "export", "runtime", "v1")
FOLDERS = {part: ROOT / part for part in PARTS} | {"v1": ROOT / "protos/swiftvideo/v1"}
TOOLS = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
"""The environment of a build: cmake and ninja are the venv's."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), "--config-settings"]
    command += [f"build-dir={folder / 'build'}", str(ROOT)]
    result = subprocess.run(command, env=TOOLS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_one_wheel_serves_python_3_11_and_later(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None
    assert "-cp311-abi3-" in Path(wheel.filename).name
    assert "swiftvideo/runtime/_core.abi3.so" in wheel.namelist()


def test_every_module_of_the_checkout_is_in_it(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"swiftvideo/{part}/{path.relative_to(folder)}"
        for part, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    assert expected and not expected - set(wheel.namelist())


def test_the_embedded_model_is_in_it_and_small(wheel: zipfile.ZipFile) -> None:
    folder = "swiftvideo/runtime/bundles/default/"
    sizes = {
        item.filename.removeprefix(folder): item.file_size
        for item in wheel.infolist()
        if item.filename.startswith(folder)
    }
    graphs = ("text_encoder", "condition", "denoise", "inject", "decode", "decode_first")
    assert {"manifest.json", "tokenizer.json", *(f"onnx/{graph}.onnx" for graph in graphs)} <= sizes.keys()
    weights = sum(size for name, size in sizes.items() if name.endswith(".data"))
    assert 0 < weights <= 12 * 2**20


def test_nothing_else_is_in_it(wheel: zipfile.ZipFile) -> None:
    suffixes = {".py", ".pyi", ".so", ".typed", ".json", ".onnx", ".data", ".proto"}
    for name in wheel.namelist():
        if ".dist-info/" in name:
            continue
        assert name.startswith(tuple(f"swiftvideo/{part}/" for part in PARTS)), name
        assert Path(name).suffix in suffixes or Path(name).name == "py.typed", name
        assert not {"tests", "csrc", "samples", "__pycache__"} & set(Path(name).parts), name
    assert "swiftvideo/__init__.py" not in wheel.namelist(), "swiftvideo is a namespace"


def test_it_is_typed_licensed_and_has_its_command(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {f"swiftvideo/{part}/py.typed" for part in PARTS} <= set(names)
    (information,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "swiftvideo=swiftvideo.sdk.entry:main" in wheel.read(information).decode().replace(" ", "")
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("part", PARTS)
def test_the_suite_runs_on_the_installed_wheel_when_asked_to(part: str) -> None:
    place = os.environ.get("SWIFTVIDEO_INSTALLED")
    spec = importlib.util.find_spec(f"swiftvideo.{part}")
    assert spec is not None
    # An editable install of a package with a C module has two places: the sources and the compiled file's.
    found = {Path(location).resolve() for location in spec.submodule_search_locations or ()}
    if place:
        assert found and all(each.is_relative_to(Path(place).resolve()) for each in found)
        assert FOLDERS[part] not in found
    else:
        assert FOLDERS[part].resolve() in found


def configure(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    """CMake's first step into folder / "build", with a Python that runs the lines `python` when it starts."""
    (folder / "sitecustomize.py").write_text(python)
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder / "build")]
    command += [
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DSKBUILD_PROJECT_NAME=x",
        "-DSKBUILD_PROJECT_VERSION=0",
    ]
    environment = {**TOOLS, "PYTHONPATH": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def refusal(folder: Path, python: str) -> str:
    """What CMake says, on one line, where it ends with an error; see `configure`."""
    result = configure(folder, python)
    assert result.returncode != 0
    return " ".join(result.stderr.split())


def test_a_wheel_that_a_later_python_builds_serves_the_earlier_ones_too(tmp_path: Path) -> None:
    """From 3.15 on the first suffix of the stable ABI names the machine, and 3.11 to 3.13 do not know that one."""
    result = configure(
        tmp_path,
        "import importlib.machinery as machinery\n"
        "machinery.EXTENSION_SUFFIXES = ['.abi3-x86_64-linux-gnu.so', '.abi3.so', '.so']\n",
    )
    assert result.returncode == 0, result.stderr
    assert set(re.findall(r"\b_core\S*\.so\b", (tmp_path / "build" / "build.ninja").read_text())) == {
        "_core.abi3.so"
    }


def test_a_free_threaded_python_is_refused_in_a_sentence(tmp_path: Path) -> None:
    said = refusal(
        tmp_path,
        "import sysconfig\n"
        "real = sysconfig.get_config_var\n"
        "sysconfig.get_config_var = lambda name: 1 if name == 'Py_GIL_DISABLED' else real(name)\n",
    )
    assert f"{sys.executable} is a free-threaded Python" in said and "use the ordinary Python" in said


def test_missing_headers_are_named_with_their_packages(tmp_path: Path) -> None:
    """Debian, Ubuntu and Fedora install Python without them."""
    said = refusal(
        tmp_path,
        "import sysconfig\n"
        "real = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *a, **b: '/nowhere' if 'include' in name else real(name, *a, **b)\n",
    )
    assert f"The headers of {sys.executable} are not there" in said
    assert f"'apt install python{sys.version_info.major}.{sys.version_info.minor}-dev'" in said
