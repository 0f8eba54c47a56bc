"""Builds one plan, in a process of its own: `python -m swiftvideo.export.tensorrt_child job.json`.

A builder that crashes takes only this process along. Progress goes to stdout, a JSON object a line; the log from INFO
up to a file that the job names; and so does the result: {"bindings", "layers" (of the builder's own report), "nodes",
"version"}, or {"error", "layer"}. Imports neither torch nor triton.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import onnx

from swiftvideo.runtime.plugins import tensorrt as plugins
from swiftvideo.runtime.plugins.flavours import FLAVOURS
from swiftvideo.runtime.plugins.kernel import Kernel, KernelSpec

DOMAIN = "swift"
REPORT = "Layers:"
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""
_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w*), Inputs: (.*)$")
_TENSOR = re.compile(r"(?:Dimensions: (\[[-\d,]*\])[^{}]*?)?Datatype: (\w+)")
PLUGIN_LAYERS = ("custom_layer", "PluginV3", "PLUGIN_V3")
"""What the report calls a plugin, in either product."""


class BuildFailure(Exception):
    """A plan could not be built; `layer` is the node's name where it is known."""

    def __init__(self, message: str, layer: str = "") -> None:
        super().__init__(message)
        self.layer = layer


def main() -> None:
    """Build the plan that the job file describes."""
    job = json.loads(Path(sys.argv[1]).read_text())
    _die_with(job["parent"])
    try:
        result = {**build(job), "peak": _peak()}
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent reports it
        layer = error.layer if isinstance(error, BuildFailure) else ""
        result = {"error": f"{type(error).__name__}: {error}", "layer": layer}
    try:
        Path(job["result"]).write_text(json.dumps(result))
    except OSError as error:
        result = {"error": result.get("error") or str(error)}
        print(json.dumps(result), flush=True)  # the pipe needs no disk
    sys.exit("error" in result)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        sys.exit("the process that builds plans is gone")


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Write job["plan"]; return its bindings, layers, our nodes, and the product's version."""
    trt = FLAVOURS[job["flavour"]].load()
    with Path(job["log"]).open("w", encoding="utf-8") as log:
        logger = _logger(trt, log)
        model = onnx.load(job["graph"], load_external_data=False)
        nodes = _name_nodes(model)
        if job["kernels"]:
            plugins.register(trt, read_kernels(Path(job["kernels"])))
            del model.functions[:]  # otherwise the parser inlines them and looks for no plugin
        try:
            builder = trt.Builder(logger)
        except TypeError as error:  # its way to say that CUDA does not start
            raise BuildFailure(f"TensorRT does not start: {logger.reason()}") from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model.SerializeToString(), job["graph"]):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise BuildFailure(
                "; ".join(error.desc() for error in errors), errors[0].node_name() if errors else ""
            )
        config = _config(trt, builder, network, job)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildFailure(logger.reason(), _layer_in(logger.errors))
        Path(job["plan"]).write_bytes(plan)
        layers = parse_report(logger.report) or inspected(trt, logger, plan)
        _keep_timings(config, job["timing_cache"])
        return {
            "bindings": _bindings(trt, network),
            "layers": layers,
            "nodes": nodes,
            "version": trt.__version__,
        }


def take_timings(config: Any, path: Path) -> None:
    """Start with the tactics that earlier builds measured; with none where the file is absent, broken or for another
    driver or GPU.
    """
    cache = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _keep_timings(config: Any, file: str | None) -> None:
    """Write the measured tactics down for the next build, in one step: another build may read them meanwhile."""
    cache = config.get_timing_cache() if file else None
    if file and cache is not None:
        partial = Path(f"{file}.{os.getpid()}")
        partial.write_bytes(cache.serialize())
        partial.replace(file)


def _peak() -> int:
    """Bytes that this process had resident at most. getrusage would count what was there before it was executed."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise BuildFailure("/proc/self/status has no VmHWM: plans are built on Linux")


def read_kernels(folder: Path) -> dict[str, Kernel]:
    """Kernels of a folder of <stem>.cubin and <stem>.json, by op."""
    found = {}
    for path in folder.glob("*.json"):
        spec = KernelSpec.from_json(path.read_bytes(), path.name)
        found[spec.op] = Kernel(spec, path.with_suffix(".cubin").read_bytes())
    return found


def parse_report(text: str) -> list[dict[str, Any]]:
    """Layers of the builder's report, as `_layer` gives them."""
    layers = []
    for line in text.splitlines():
        match = _LAYER.match(line)
        if match:
            inputs, outputs = match[3].split(", Constants: ")[0], match[3].rpartition("Outputs: ")[2]
            read, written = (
                [(m[2], m[1] or "[]") for m in _TENSOR.finditer(part)] for part in (inputs, outputs)
            )
            layers.append(_layer(match[1], match[2], read, written))
    return layers


def _layer(
    name: str, kind: str, read: list[tuple[str, str]], written: list[tuple[str, str]]
) -> dict[str, Any]:
    """name, type, plugin (whether it is one), precision (of its outputs), inputs and outputs as "Float[1,96,-1]"."""
    return {
        "name": name,
        "type": kind,
        "plugin": kind in PLUGIN_LAYERS,
        "precision": "/".join(sorted({dtype for dtype, _ in written or read} - {""})),
        "inputs": [dtype + shape for dtype, shape in read],
        "outputs": [dtype + shape for dtype, shape in written],
    }


def inspected(trt: Any, logger: Any, plan: Any) -> list[dict[str, Any]]:
    """Layers by the engine inspector, for a builder whose log has no report; it loads the plan, which takes a GPU."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildFailure(f"the plan that was just built does not load: {logger.reason()}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return parse_inspection(text)


def parse_inspection(text: str) -> list[dict[str, Any]]:
    """Layers of the engine inspector's JSON, as `parse_report` gives them."""
    layers = []
    for layer in json.loads(text)["Layers"]:
        read, written = (
            [
                (
                    str(tensor.get("Datatype", "")),
                    json.dumps(tensor.get("Dimensions", []), separators=(",", ":")),
                )
                for tensor in layer.get(side, [])
            ]
            for side in ("Inputs", "Outputs")
        )
        layers.append(_layer(layer["Name"], str(layer.get("LayerType", "")), read, written))
    return layers


def _name_nodes(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Give our nodes names that the report can be searched for; list them with op and layer."""
    nodes = []
    for node in model.graph.node:
        if node.domain == DOMAIN:
            attributes = {item.name: item.i for item in node.attribute}
            node.name = f"swift.{node.op_type}.{attributes.get('layer', 0)}."
            nodes.append({"name": node.name, "op": node.op_type, "layer": attributes.get("layer", 0)})
    return nodes


def _config(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    if job["flavour"] == "tensorrt_rtx":  # the other product builds for the GPU that is there
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job['capability']}"), 0):
            raise BuildFailure(f"this version does not build for compute capability {job['capability']}")
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the layer report names our nodes
    config.progress_monitor = _monitor(trt)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32, as everywhere else
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(
            trt.BuilderFlag.REQUIRE_USER_ALLOCATION
        )  # what runs allocates nothing, so it can be captured
    if job["timing_cache"]:
        take_timings(config, Path(job["timing_cache"]))
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            dynamic = True
            names = [tensor.get_dimension_name(axis) for axis in range(len(shape))]
            unknown = [
                name for size, name in zip(shape, names, strict=True) if size < 0 and name not in job["sizes"]
            ]
            if unknown:
                raise BuildFailure(
                    f"input {tensor.name} has axes {unknown}; sizes are known of {sorted(job['sizes'])}"
                )
            profile.set_shape(
                tensor.name,
                *(
                    [
                        job["sizes"][name][k] if size < 0 else size
                        for size, name in zip(shape, names, strict=True)
                    ]
                    for k in range(3)
                ),
            )
    if dynamic and config.add_optimization_profile(profile) < 0:
        raise BuildFailure(f"the sizes {job['sizes']} are not accepted")
    return config


def _bindings(trt: Any, network: Any) -> list[dict[str, Any]]:
    """Inputs and outputs: name, mode, dtype, shape with -1 for dynamic axes."""
    found = []
    for mode, count, get in (
        ("input", network.num_inputs, network.get_input),
        ("output", network.num_outputs, network.get_output),
    ):
        for index in range(count):
            tensor = get(index)
            kind = tensor.dtype.name
            found.append({"name": tensor.name, "mode": mode, "dtype": kind, "shape": list(tensor.shape)})
    return found


def _layer_in(errors: list[str]) -> str:
    """A node's name, where an error message has one in brackets or quotes."""
    for text in errors:
        match = re.search(r"(?:node|layer|\[)\s*[\[\"']?((?:node_|swift\.)[\w.:/]+)", text)
        if match:
            return match[1]
    return ""


def _logger(trt: Any, log: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and the layer report; writes the rest down."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.report = ""

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(text)
            if text.startswith(REPORT):
                self.report = text
            if severity != trt.ILogger.Severity.VERBOSE:
                log.write(f"{severity.name}: {text}\n")
                log.flush()

        def reason(self) -> str:
            """Of a failure: what was said last."""
            return "; ".join(self.errors[-3:]) or "it gave no reason"

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Prints the outermost phases' steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            depth = self.phases[parent][0] + 1 if parent in self.phases else 0
            self.phases[name] = (depth, steps)
            self.say(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self.say(name, step + 1)
            return True

        def phase_finish(self, name: str) -> None:
            self.say(name, self.phases[name][1])

        def say(self, name: str, step: int) -> None:
            depth, steps = self.phases[name]
            if depth <= 1:
                print(json.dumps({"phase": name, "depth": depth, "step": step, "steps": steps}), flush=True)

    return Monitor()


if __name__ == "__main__":
    main()
