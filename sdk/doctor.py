"""What this machine can run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swiftvideo.runtime.engines.host import usable_cores

from .machine import version


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    usable: bool
    note: str


def findings() -> list[Finding]:
    """Python, machine, engines, GPUs, codec and the parts for exporting, in that order."""
    from .gpus import gpu_findings

    found = [
        Finding("swiftvideo", True, version()),
        Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("machine", True, f"{usable_cores()} cores for this process"),
        _embedded(),
        _onnxruntime(),
        *gpu_findings(),
        _torch(),
        _video(),
    ]
    missing = _missing()
    note = missing or f"torch {_release('torch')}, onnx {_release('onnx')}"
    return [*found, Finding("export and verify", not missing, note)]


def show(console: Console) -> None:
    """Print `findings`."""
    table = Table(box=None, show_header=False)
    for item in findings():
        usable = Text("yes", "green") if item.usable else Text("no", "yellow")
        table.add_row(item.what, usable, Text(item.note))
    console.print(table)


def _embedded() -> Finding:
    from swiftvideo.runtime import Manifest
    from swiftvideo.runtime.errors import SwiftVideoError
    from swiftvideo.runtime.pipeline import EMBEDDED

    try:
        manifest = Manifest.load(EMBEDDED)
    except SwiftVideoError as error:
        return Finding("embedded model", False, str(error))
    g = manifest.geometry
    return Finding("embedded model", True, f"{manifest.model}, {g.width}x{g.height}, {manifest.dtype}")


def _onnxruntime() -> Finding:
    try:
        from swiftvideo.runtime.engines.ort import onnxruntime
    except ImportError as error:
        return Finding("engine onnxruntime", False, f"{error}: pip install onnxruntime")
    return Finding("engine onnxruntime", True, f"{onnxruntime.__version__}, CPU")


def _torch() -> Finding:
    missing = _missing()
    if missing:
        return Finding("engine torch", False, missing)
    return Finding("engine torch", True, f"{_release('torch')}; a GPU if torch sees one, else the CPU")


def _video() -> Finding:
    from .output import OutputError

    try:
        from .video import choose_codec

        return Finding("video", True, f"encoder {choose_codec()}")
    except ImportError as error:
        return Finding("video", False, f"{error}: pip install av")
    except OutputError as error:
        return Finding("video", False, str(error))


def _missing() -> str:
    """Which parts of the extra `export` are not there, and the remedy; empty if all are."""
    names = ("torch", "onnx", "onnxscript", "diffusers", "transformers")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: pip install 'swiftvideo[export]'" if missing else ""


def _release(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
