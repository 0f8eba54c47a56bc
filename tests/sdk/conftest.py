"""What tests of the command share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def options(tiny_bundle: Path) -> list[object]:
    return ["--bundle", tiny_bundle, "--threads", 1]
