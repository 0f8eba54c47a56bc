"""What figures were taken on: hardware, commit, versions, memory of this process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from swiftvideo.runtime.engines.host import usable_cores

LIBRARIES = ("numpy", "onnxruntime", "av", "torch", "onnx")


def describe() -> dict[str, Any]:
    """Machine, commit and versions, as plain values; absent things are None."""
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": usable_cores(),
            "memory_gib": _memory(),
            "system": platform.platform(),
        },
        "commit": commit(),
        "versions": {"swiftvideo": version(), "python": platform.python_version(), **_libraries()},
        "load_average": round(os.getloadavg()[0], 2),
    }


def version() -> str:
    """Version of the installed package."""
    try:
        return importlib.metadata.version("swiftvideo")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def commit() -> str | None:
    """The checkout's commit, with "+" where files were changed; None outside a checkout or without git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    git = ("git", "-C", str(root))
    try:
        changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
        return _output(*git, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def memory_mib() -> dict[str, float]:
    """`resident`: this process now; `peak`: the most it ever had. MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    now = _resident()
    peak = max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)  # Linux updates it late
    return {"resident": round(now / 2**20, 1), "peak": round(peak / 2**20, 1)}


def _resident(root: Path = Path("/")) -> int:
    """Bytes of this process; root: of the file system that says it, where one does."""
    statm = root / "proc/self/statm"
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(_output("ps", "-o", "rss=", "-p", str(os.getpid()))) * 1024


def _cpu(root: Path = Path("/")) -> str:
    """Its name. Linux on ARM has it from `lscpu` alone, macOS from `sysctl`."""
    info = root / "proc/cpuinfo"
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    try:
        if sys.platform == "darwin":
            return _output("sysctl", "-n", "machdep.cpu.brand_string")
        if "model name" not in text:
            text = _output("lscpu")
    except (OSError, subprocess.CalledProcessError):
        pass
    named = re.search(r"^model name\s*: *(.+)", text, re.MULTILINE | re.IGNORECASE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def _memory() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _libraries() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
