"""NVIDIA's own Python module of TensorRT 11, as PyPI has it, without the libraries, which come from another index.

The libraries' few functions are stood in for by ones that return null: classes can be defined, made and asked; nothing
can be built or run.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime.plugins.flavours import TENSORRT

LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
MODULE = "tensorrt_bindings"


def load(folder: Path) -> Any:
    """The module; skips where it is not installed. `folder` is for the stand-ins.

    Where all of TensorRT is installed, that: its libraries and stand-ins of their names do not go together.
    """
    if TENSORRT.installed:
        return TENSORRT.load()
    if MODULE in sys.modules:
        return sys.modules[MODULE]
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("NVIDIA's bindings are not installed: pip install 'swiftvideo[dev]'")
    if shutil.which("cc") is None or shutil.which("nm") is None:
        pytest.skip("stand-ins of TensorRT's libraries need a C compiler")
    extension = Path(spec.submodule_search_locations[0]) / "tensorrt.so"
    functions = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in _missing(extension))
    for name in LIBRARIES:
        source, library = folder / f"{name}.c", folder / name
        source.write_text(functions)
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", library, source], check=True)
        # Who needs it by its name looks no further; nobody else sees its functions, which TensorRT-RTX has as well.
        ctypes.CDLL(str(library), ctypes.RTLD_LOCAL)
    return importlib.import_module(MODULE)


def _missing(extension: Path) -> list[str]:
    """Functions that an extension module takes from other libraries than the system's and Python's."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", extension], capture_output=True, text=True, check=True
    )
    return re.findall(r"^ +U (?!_?Py)(\w+)$", listed.stdout, re.MULTILINE)
