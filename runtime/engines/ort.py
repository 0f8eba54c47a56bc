"""ONNX Runtime, imported here and nowhere else in the package.

Its official builds report to Microsoft what they run on, and keep a database of it at home, unless they are told not to
before they are loaded.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
