"""What make says before it installs anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("version", "well"), [((3, 9, 6), False), ((3, 11, 0), True)])
def test_a_python_that_is_too_old_is_named_and_makes_no_venv(
    tmp_path: Path, version: tuple[int, ...], well: bool
) -> None:
    """Such as macOS's own; with a venv there already, nobody asks."""
    python = tmp_path / "python3"
    program = f"import sys; sys.version_info = {version}; exec(sys.argv[2]) if sys.argv[1] == '-c' else print('made')"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n')
    python.chmod(0o755)
    command = ["make", "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2  # in either case there is no venv to go on with
    assert ("made" in found.stdout) is well, found.stdout
    refusal = f"{python} is Python 3.9 and 3.11 is needed: name another one, PYTHON=python3.12"
    assert (refusal in found.stderr) is not well, found.stderr
