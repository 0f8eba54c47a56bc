"""What figures are taken on, on systems that tell it in other ways than Linux on x86-64."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from swiftvideo.sdk import machine

ARM = "processor\t: 0\nBogoMIPS\t: 2000.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\n"


def program(folder: Path, name: str, text: str) -> None:
    """A command that prints `text`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("system", "cpuinfo", "name"),
    [
        ("linux", X86, "AMD EPYC 9B14"),
        ("linux", ARM, "Neoverse-V2"),
        ("darwin", None, "Apple M2"),
    ],
)
def test_the_processor_has_its_name_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, cpuinfo: str | None, name: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    if cpuinfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    program(tmp_path / "bin", "lscpu", "Vendor ID:   ARM\nModel name:  Neoverse-V2\nModel:       1\n")
    program(tmp_path / "bin", "sysctl", "Apple M2\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert machine._cpu(tmp_path) == name


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_without_a_program_that_knows_the_processor_it_is_the_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._cpu(tmp_path) in (platform.processor(), platform.machine())


@pytest.mark.parametrize("root", ["/", "nowhere"])
def test_memory_is_that_of_now_without_proc_too(tmp_path: Path, root: str) -> None:
    """A peak that went by does not count."""
    if root == "nowhere" and shutil.which("ps") is None:
        pytest.skip("ps is not installed")
    np.ones(1 << 26, np.uint8).sum()
    actual = psutil.Process().memory_info().rss
    assert abs(machine._resident(tmp_path / root) - actual) < 16 << 20


def test_the_peak_is_in_bytes_on_macos_and_never_below_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"linux": 300 << 10, "darwin": 300 << 20}
    for system, peak in told.items():
        usage = resource.struct_rusage([0.0, 0.0, peak, *range(13)])
        monkeypatch.setattr(resource, "getrusage", lambda _, usage=usage: usage)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(machine, "_resident", lambda: 100 << 20)
        assert machine.memory_mib() == {"resident": 100.0, "peak": 300.0}
        monkeypatch.setattr(machine, "_resident", lambda: 301 << 20)
        assert machine.memory_mib() == {"resident": 301.0, "peak": 301.0}
