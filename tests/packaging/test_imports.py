"""The runtime and the SDK import on a bare machine: no torch, no gRPC, no TensorRT, no GPU."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = (
    "torch",
    "onnx",
    "onnxscript",
    "diffusers",
    "transformers",
    "triton",
    "grpc",
    "tensorrt",
    "tensorrt_rtx",
)

SERVICE = tuple(
    f"swiftvideo.sdk.{name}"
    for name in ("server.", "client", "aio", "remote", "connection", "generate_remote")
)

IMPORT_ALL = f"""
import importlib, importlib.abc, importlib.util, pkgutil, sys

BLOCKED = {BLOCKED!r}
SERVICE = {SERVICE!r}


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in BLOCKED or top.startswith("tensorrt"):
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
        return None


sys.meta_path.insert(0, Blocker())
count = 0
for part in sys.argv[1:]:
    package = importlib.import_module(f"swiftvideo.{{part}}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=print):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # the service and its clients are what gRPC is for
            if error.name != "grpc" or not module.name.startswith(SERVICE):
                raise
        count += 1
    loaded = [name for name in sys.modules if name.startswith("swiftvideo.")]
    if part == "runtime":
        above = [name for name in loaded if name.startswith(("swiftvideo.sdk", "swiftvideo.export"))]
        assert not above, f"the runtime imported {{above}}"
assert count, "no submodule was found"
print(count)
"""


def test_every_submodule_imports_without_the_heavy_libraries() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", IMPORT_ALL, "runtime", "sdk"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 5


def test_the_command_explains_itself_without_them() -> None:
    program = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
sys.argv = ["swiftvideo", "--help"]
from swiftvideo.sdk.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "generate" in result.stdout
