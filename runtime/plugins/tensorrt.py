"""The two custom ops as TensorRT plugins (IPluginV3), for `tensorrt` and `tensorrt_rtx` alike.

The module is a parameter: `register(trt, kernels)` makes the classes for it and registers their creators in namespace
`swift`. A plugin carries its attributes, its kernel's description and the cubin in its serialised fields, so a plan
needs no file beside it. Formats are linear; K, V and outputs share one dtype.

TensorRT's Python interface takes no error code from `enqueue`: an exception is how it is told of a failure there. What
the launch itself returned is in the message, which `last_failure` keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from swiftvideo.runtime.errors import EngineError, SettingsError

from .kernel import ATTENTION, INJECTION, Kernel, KernelSpec
from .launch import Launcher
from .split import Split, workspace

NAMESPACE = "swift"
VERSION = "1"
PLUGINS = (ATTENTION, INJECTION)

_DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
_FLOAT_INPUTS = {ATTENTION: frozenset[int](), INJECTION: frozenset((2, 3, 4, 5))}
_INT_INPUTS = {ATTENTION: frozenset((5,)), INJECTION: frozenset((1,))}
_FAILED = [""]
_REGISTERED: dict[str, list[Any]] = {}
"""Creators by module name: registries do not keep Python objects alive, and take each name once."""


def register(trt: Any, kernels: dict[str, Kernel] | None = None) -> list[Any]:
    """Register the creators of both plugins with `trt`; return them. A second call only replaces the kernels.

    kernels: by op, for building; None is enough for loading plans, which carry their own.
    """
    if trt.__name__ not in _REGISTERED:
        plugin_class = _plugin_class(trt)
        creator_class = _creator_class(trt, plugin_class)
        creators = [creator_class(op) for op in PLUGINS]
        registry = trt.get_plugin_registry()
        for creator in creators:
            if not registry.register_creator(creator, NAMESPACE):
                raise EngineError(
                    f"TensorRT refused the plugin {NAMESPACE}::{creator.name} version {VERSION}"
                )
        _REGISTERED[trt.__name__] = creators
    for creator in _REGISTERED[trt.__name__]:
        creator.kernel = None if kernels is None else kernels[creator.name]
    return _REGISTERED[trt.__name__]


def fields(trt: Any, kernel: Kernel, layer: int, scale: float) -> list[tuple[Any, Any]]:
    """The serialised fields of a plugin, each with its array: attributes, the kernel's description, the cubin."""
    kinds = trt.PluginFieldType
    arrays = (
        ("layer", np.array([layer], np.int32), kinds.INT32),
        ("scale", np.array([scale], np.float32), kinds.FLOAT32),
        ("kernel", _bytes(kernel.spec.to_json().encode()), kinds.CHAR),
        ("cubin", _bytes(kernel.cubin), kinds.INT8),
    )
    return [(trt.PluginField(name, array, kind), array) for name, array, kind in arrays]


def read_fields(collection: Any, name: str) -> tuple[int, float, Kernel]:
    """(layer, scale, kernel) of `fields`. Raises EngineError, or BundleIntegrityError for a cubin that was changed."""
    given = {item.name: item.data for item in collection}
    missing = {"layer", "scale", "kernel", "cubin"} - set(given)
    if missing:
        raise EngineError(
            f"the plan's plugin {name} has no {', '.join(sorted(missing))}: build the plan again"
        )
    text, cubin = (np.asarray(given[key]).tobytes() for key in ("kernel", "cubin"))
    kernel = Kernel(KernelSpec.from_json(text, f"plugin {name}"), cubin)
    return int(np.asarray(given["layer"]).ravel()[0]), float(np.asarray(given["scale"]).ravel()[0]), kernel


def last_failure() -> str:
    """What a plugin raised last, or nothing. TensorRT writes it to stderr and returns no more than that it failed."""
    return _FAILED[0]


def _remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except Exception as error:
            _FAILED[0] = f"{type(error).__name__}: {error}"
            raise

    return call


def _bytes(content: bytes) -> Any:
    return np.frombuffer(content, np.int8).copy()


def _plugin_class(trt: Any) -> type[Any]:
    """The plugin of either op, on the base classes of `trt`."""
    dtypes = {name: getattr(trt.DataType, member) for name, member in _DTYPES.items()}

    bases: tuple[Any, ...] = (
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuild,
        trt.IPluginV3OneRuntime,
    )

    class SwiftPlugin(*bases):  # type: ignore[misc]
        """One node of the graph. Which op it is, is `plugin_name`."""

        def __init__(self, op: str, layer: int, scale: float, kernel: Kernel) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = op, VERSION, NAMESPACE
            self.num_outputs = 1 if op == ATTENTION else 2
            self.layer, self.scale, self.kernel = layer, scale, kernel
            self.launcher: Launcher | None = None
            self.split: Split | None = None
            self.serialised: tuple[Any, list[tuple[Any, Any]]] | None = None

        # -- core

        def get_capability_interface(self, _: Any) -> Any:
            return self

        def clone(self) -> Any:
            return SwiftPlugin(self.plugin_name, self.layer, self.scale, self.kernel)

        # -- build

        @_remembered
        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            heads = inputs[0].desc.dims
            if heads[-1] not in (self.kernel.spec.head_dim, -1):
                raise SettingsError(
                    f"{self.plugin_name} has heads of {heads[-1]} and its kernel is for {self.kernel.spec.head_dim}"
                )

        def supports_format_combination(self, place: int, descriptions: Any, count: int) -> bool:
            op, seen = self.plugin_name, descriptions[place].desc
            if place in _INT_INPUTS[op]:
                wanted = trt.DataType.INT32
            elif place in _FLOAT_INPUTS[op]:
                wanted = trt.DataType.FLOAT
            else:
                wanted = dtypes[self.kernel.spec.dtype]
            return bool(seen.format == trt.TensorFormat.LINEAR and seen.type == wanted)

        def get_output_data_types(self, inputs: Any) -> Any:
            return [inputs[0]] * self.num_outputs

        def get_output_shapes(self, inputs: Any, _: Any, builder: Any) -> Any:
            if self.plugin_name == ATTENTION:
                return [trt.DimsExprs(inputs[0])]
            shapes = []
            for tokens in (2, 1):
                shape = trt.DimsExprs(inputs[0])
                shape[2] = builder.constant(tokens)
                shapes.append(shape)
            return shapes

        def get_workspace_size(self, *_: Any) -> int:
            return workspace(self.kernel.spec) if self.plugin_name == ATTENTION else 0

        # -- run time

        def get_fields_to_serialize(self) -> Any:
            # TensorRT reads the collection's own memory after this returns, and fields point at their arrays: all of
            # it lives as long as the plugin.
            made = fields(trt, self.kernel, self.layer, self.scale)
            collection = trt.PluginFieldCollection([field for field, _ in made])
            self.serialised = collection, made
            return collection

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """Shapes come with every enqueue."""

        def attach_to_context(self, _: Any) -> Any:
            return self.clone()

        def set_tactic(self, _: int) -> None:
            """There is one tactic."""

        @_remembered
        def enqueue(
            self, inputs: Any, outputs: Any, given: Any, made: Any, partial: int, stream: int
        ) -> None:
            if self.launcher is None:  # a context is current only from here on
                self.launcher = Launcher(self.kernel)
                self.split = Split.of(self.launcher) if self.plugin_name == ATTENTION else None
            first = tuple(inputs[0].dims)
            if self.split is None:
                layers, batch, rows, heads, _width = first
                sizes = {"heads": heads, "batch": batch, "layers": layers}
                self.launcher.run(stream, sizes, *given, *made, batch, heads, rows)
                return
            batch, queries, heads, _width = first
            rows = inputs[3].dims[2]
            values = (*given, *made, partial, self.layer, self.scale, batch, heads, queries, rows)
            for phase in self.split.phases(queries, heads, batch, rows):
                self.launcher.run(stream, {"programs": phase.programs}, *values, *phase.arguments)

    return SwiftPlugin


def _creator_class(trt: Any, plugin_class: Any) -> type[Any]:
    class SwiftCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes the plugin of one op: from a node's attributes when building, from its own fields when loading."""

        def __init__(self, op: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = op, VERSION, NAMESPACE
            names = ("layer", "scale") if op == ATTENTION else ()
            kinds = (trt.PluginFieldType.INT32, trt.PluginFieldType.FLOAT32)
            empty = np.array([], np.int32)
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, empty, kind) for name, kind in zip(names, kinds, strict=False)]
            )
            self.kernel: Kernel | None = None

        @_remembered
        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            if phase == trt.TensorRTPhase.RUNTIME:
                return plugin_class(self.name, *read_fields(collection, name))
            if self.kernel is None:
                raise EngineError(f"no kernel of {self.name} is registered: compile one before building")
            given = {item.name: np.asarray(item.data).ravel() for item in collection}
            layer = int(given["layer"][0]) if "layer" in given else 0
            scale = float(given["scale"][0]) if "scale" in given else 1.0
            if not scale > 0:
                raise SettingsError(f"{name} has scale {scale}: the kernel needs a positive one")
            return plugin_class(self.name, layer, scale, self.kernel)

    return SwiftCreator
