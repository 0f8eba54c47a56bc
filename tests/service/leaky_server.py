"""A server that leaks, to show that the harness sees it: python -m tests.service.leaky_server --bundle ..."""

from __future__ import annotations

import sys

from .faults import leaky

if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    leaky()
