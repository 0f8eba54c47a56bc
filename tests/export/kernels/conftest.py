"""One interpreter process for all tests of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install 'swiftvideo[export]'")

from .interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    child = Interpreter()
    yield child
    child.close()
