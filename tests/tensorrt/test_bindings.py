"""TensorRT 11's own classes: that they have what the package uses, as TensorRT-RTX's have, and that plugins are made of
them. One path serves both products, and only the other one can be built with here.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swiftvideo.export import tensorrt_child
from swiftvideo.runtime.engines import tensorrt as engine
from swiftvideo.runtime.plugins import tensorrt as plugins
from swiftvideo.runtime.plugins.flavours import RTX, TENSORRT, Flavour
from swiftvideo.runtime.plugins.kernel import ATTENTION, INJECTION

from . import bindings
from .test_refusals import kernel

SOURCES = (tensorrt_child, plugins, engine)
RTX_ALONE = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
}
"""Used where they are there, or for that product only."""

BY_STRINGS = {f"DataType.{name}" for name in (*plugins._DTYPES.values(), *engine.TRT_DTYPES)}
BY_STRINGS |= {"PluginFieldType.CHAR", "PluginFieldType.INT8"}
"""Used, and not written in a way that `named` finds."""

METHODS = """
Builder(logger)
Builder.create_network(flags)
Builder.create_builder_config()
Builder.create_optimization_profile()
Builder.build_serialized_network(network, config)
IBuilderConfig.set_flag(flag)
IBuilderConfig.clear_flag(flag)
IBuilderConfig.create_timing_cache(serialized_timing_cache)
IBuilderConfig.set_timing_cache(cache, ignore_mismatch)
IBuilderConfig.get_timing_cache()
IBuilderConfig.add_optimization_profile(profile)
ITimingCache.serialize()
IOptimizationProfile.set_shape(input, min, opt, max)
INetworkDefinition.get_input(index)
INetworkDefinition.get_output(index)
ITensor.get_dimension_name(index)
OnnxParser(network, logger)
OnnxParser.parse(model, path)
OnnxParser.get_error(index)
ParserError.desc()
ParserError.node_name()
IPluginRegistry.register_creator(creator, plugin_namespace)
PluginField(name, data, type)
IExprBuilder.constant(arg0)
IPluginV3.get_capability_interface(type)
IPluginV3.clone()
IPluginV3OneBuild.configure_plugin(in, out)
IPluginV3OneBuild.supports_format_combination(pos, in_out, num_inputs)
IPluginV3OneBuild.get_output_data_types(input_types)
IPluginV3OneBuild.get_output_shapes(inputs, shape_inputs, expr_builder)
IPluginV3OneBuild.get_workspace_size(in, out)
IPluginV3OneRuntime.get_fields_to_serialize()
IPluginV3OneRuntime.on_shape_change(in, out)
IPluginV3OneRuntime.attach_to_context(resource_context)
IPluginV3OneRuntime.set_tactic(tactic)
IPluginV3OneRuntime.enqueue(input_desc, output_desc, inputs, outputs, workspace, stream)
IPluginCreatorV3One.create_plugin(name, field_collection, phase)
IProgressMonitor.phase_start(phase_name, parent_phase, num_steps)
IProgressMonitor.step_complete(phase_name, step)
IProgressMonitor.phase_finish(phase_name)
ILogger.log(severity, msg)
Runtime(logger)
Runtime.deserialize_cuda_engine(serialized_engine)
ICudaEngine.get_tensor_name(index)
ICudaEngine.get_tensor_mode(name)
ICudaEngine.get_tensor_shape(name)
ICudaEngine.get_tensor_dtype(name)
ICudaEngine.create_engine_inspector()
ICudaEngine.create_runtime_config()
ICudaEngine.create_execution_context(runtime_config)
EngineInspector.get_engine_information(format)
IRuntimeConfig.set_execution_context_allocation_strategy(strategy)
IExecutionContext.set_device_memory(memory, size)
IExecutionContext.set_input_shape(name, shape)
IExecutionContext.get_tensor_shape(name)
IExecutionContext.set_tensor_address(name, memory)
IExecutionContext.execute_async_v3(stream_handle)
"""

PROPERTIES = """
IBuilderConfig.profiling_verbosity IBuilderConfig.progress_monitor INetworkDefinition.num_inputs
INetworkDefinition.num_outputs ITensor.name ITensor.shape ITensor.dtype OnnxParser.num_errors
PluginField.name PluginField.data DynamicPluginTensorDesc.desc PluginTensorDesc.dims PluginTensorDesc.type
PluginTensorDesc.format IPluginV3OneCore.plugin_name IPluginV3OneCore.plugin_version
IPluginV3OneCore.plugin_namespace IPluginV3OneBuild.num_outputs IPluginCreatorV3One.name
IPluginCreatorV3One.plugin_version IPluginCreatorV3One.plugin_namespace IPluginCreatorV3One.field_names
Runtime.engine_host_code_allowed ICudaEngine.num_io_tensors ICudaEngine.device_memory_size_v2
IExecutionContext.name
"""


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt_rtx"])
def trt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Either product's module."""
    if request.param == "tensorrt":
        return bindings.load(tmp_path_factory.mktemp("libraries"))
    return pytest.importorskip(RTX.module, reason=RTX.install)


def found(trt: Any, path: str) -> Any:
    place = trt
    for name in path.split("."):
        place = inspect.getattr_static(place, name)
    return place


def named(module: Any) -> set[str]:
    """What a source file names of `trt`, such as "BuilderFlag.TF32"."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute):
            own = re.fullmatch(r"(?:self\._)?trt\.([\w.]+?)(?:\.__init__)?", ast.unparse(node))
            names |= {own[1]} if own else set()
    return names


def test_every_name_that_the_package_uses_is_there(trt: Any) -> None:
    names = BY_STRINGS.union(*map(named, SOURCES))
    assert {"BuilderFlag.TF32", "IPluginV3OneRuntime", "TensorIOMode.INPUT"} <= names
    missing = {name for name in names if not _resolves(trt, name)}
    assert missing == (set() if trt.__name__ == RTX.module else RTX_ALONE & names)


def _resolves(trt: Any, path: str) -> bool:
    try:
        found(trt, path)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("line", METHODS.split("\n")[1:-1])
def test_methods_take_what_they_are_given(trt: Any, line: str) -> None:
    path, arguments = re.fullmatch(r"([\w.]+)\((.*)\)", line).groups()  # type: ignore[union-attr]
    method = found(trt, path if "." in path else f"{path}.__init__")
    signatures = re.findall(r"\w+\(self: [\w.:]+(.*)\) -> ", method.__doc__ or "")
    wanted = [name for name in arguments.split(", ") if name]
    assert wanted in [re.findall(r", (\w+): ", signature) for signature in signatures], method.__doc__


@pytest.mark.parametrize("path", PROPERTIES.split())
def test_properties_are_there(trt: Any, path: str) -> None:
    assert isinstance(found(trt, path), property)


# -- plugins and loggers of these classes


def made(trt: Any, op: str) -> Any:
    """A creator that no registry knows."""
    creator = plugins._creator_class(trt, plugins._plugin_class(trt))(op)
    creator.kernel = kernel(op)
    return creator


def attributes(trt: Any) -> Any:
    return trt.PluginFieldCollection(
        [
            trt.PluginField("layer", np.array([2], np.int32), trt.PluginFieldType.INT32),
            trt.PluginField("scale", np.array([0.125], np.float32), trt.PluginFieldType.FLOAT32),
        ]
    )


def create(trt: Any, creator: Any, fields: Any, phase: str) -> Any:
    """As a parser or a runtime does: through the C++ interface."""
    return trt.IPluginCreatorV3One.create_plugin(creator, "a node", fields, getattr(trt.TensorRTPhase, phase))


def test_a_plugin_goes_through_its_fields(trt: Any) -> None:
    creator = made(trt, ATTENTION)
    assert [field.name for field in creator.field_names] == ["layer", "scale"]
    plugin = create(trt, creator, attributes(trt), "BUILD")
    loaded = create(trt, creator, plugin.get_fields_to_serialize(), "RUNTIME")
    assert (loaded.layer, loaded.scale, loaded.kernel.cubin) == (2, 0.125, kernel(ATTENTION).cubin)
    assert loaded.kernel.spec == plugin.kernel.spec and loaded.num_outputs == 1
    kept = loaded.clone()
    assert (kept.plugin_name, kept.plugin_version, kept.plugin_namespace) == (ATTENTION, "1", "swift")


def test_fields_outlive_the_call_that_makes_them(trt: Any) -> None:
    plugin = create(trt, made(trt, INJECTION), trt.PluginFieldCollection([]), "BUILD")
    collection = plugin.get_fields_to_serialize()
    assert any(item is collection for item in plugin.serialised)


def test_a_plugin_is_found_under_each_of_its_capabilities(trt: Any) -> None:
    plugin = create(trt, made(trt, INJECTION), trt.PluginFieldCollection([]), "BUILD")
    for kind, base in (
        ("CORE", trt.IPluginV3OneCore),
        ("BUILD", trt.IPluginV3OneBuild),
        ("RUNTIME", trt.IPluginV3OneRuntime),
    ):
        interface = trt.IPluginV3.get_capability_interface(plugin, getattr(trt.PluginCapabilityType, kind))
        assert isinstance(interface, base), kind


def test_what_a_creator_raises_is_kept(trt: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """C++ gets nothing, and writes to stderr alone."""
    creator = made(trt, ATTENTION)
    creator.kernel = None
    assert create(trt, creator, attributes(trt), "BUILD") is None
    assert "no kernel of DynamicWindowAttention is registered" in plugins.last_failure()
    assert "no kernel of DynamicWindowAttention" in capfd.readouterr().err


def test_descriptions_are_read_as_tensorrt_writes_them(trt: Any) -> None:
    plugin = create(trt, made(trt, ATTENTION), attributes(trt), "BUILD")
    description, place = trt.PluginTensorDesc(), trt.DynamicPluginTensorDesc()
    description.dims, description.type = trt.Dims((1, 21, 2, 24)), trt.DataType.FLOAT
    description.format = trt.TensorFormat.LINEAR
    place.desc = description
    plugin.configure_plugin([place], [place])
    assert plugin.supports_format_combination(0, [place] * 7, 6)
    assert not plugin.supports_format_combination(5, [place] * 7, 6)


def test_the_loggers_keep_errors(trt: Any) -> None:
    logger = engine._logger(trt)
    for severity, text in (("INFO", "no error"), ("ERROR", "an error"), ("VERBOSE", "Layers:")):
        trt.ILogger.log(logger, getattr(trt.ILogger.Severity, severity), text)
    assert logger.last() == "an error"


@pytest.fixture
def unable(tmp_path: Path) -> Any:
    """TensorRT where it does not start: its libraries are stand-ins."""
    module = bindings.load(tmp_path)
    if module.__name__ != bindings.MODULE:
        pytest.skip("TensorRT is installed, so it may start")
    return module


def test_a_runtime_that_does_not_start_is_a_type_error(unable: Any) -> None:
    """Which the engine turns into its own."""
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        unable.Runtime(engine._logger(unable))


def test_a_builder_that_does_not_start_is_said(
    unable: Any, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flavour, "load", lambda self: unable)
    graph = exported / "onnx" / "inject.onnx"
    job = {"flavour": "tensorrt", "graph": str(graph), "log": str(tmp_path / "log"), "kernels": None}
    with pytest.raises(tensorrt_child.BuildFailure, match="TensorRT does not start: it gave no reason"):
        tensorrt_child.build(job)


def test_the_version_is_the_distribution_s(trt: Any) -> None:
    """Which is how plans of another version are recognised without importing anything."""
    if trt.__name__ == bindings.MODULE:
        assert importlib.metadata.version("tensorrt_cu13_bindings") == trt.__version__
    else:
        assert trt.__version__ in (RTX.installed, TENSORRT.installed)
