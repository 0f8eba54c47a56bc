"""ONNX Runtime on the CPU: the engine that runs everywhere.

Weights come from the bytes that the manifest verified (`Manifest.read_file`), also where a graph keeps them in external
data. Cache rows are numpy arrays that the graphs read in place.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.engine import Float32, Float64, Frames, Int32, Int64, Prompt
from swiftvideo.runtime.errors import (
    BundleError,
    ClosedError,
    EngineError,
    EngineUnavailableError,
    OutOfMemoryError,
    UsageError,
)
from swiftvideo.runtime.geometry import Geometry
from swiftvideo.runtime.manifest import GRAPHS, Manifest

from .host import HostCache, usable_cores
from .ort import onnxruntime as ort
from .state import floats

Array = NDArray[Any]

DTYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}
ORT_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

MOST_THREADS = 4
"""For every core. Hundreds wait for each other instead of working."""


class OnnxRuntimeEngine:
    """Engine over a bundle's ONNX graphs (see `swiftvideo.runtime.engine.Engine`).

    Args:
        manifest: of the bundle. Graphs that it does not list are not there; using them raises BundleError.
        threads: of one graph's run; None: one for every core that this process may use.

    Raises:
        BundleError: a file is missing or was changed.
        EngineUnavailableError: the bundle's dtype cannot run on a CPU.
    """

    name = "onnxruntime"

    def __init__(self, manifest: Manifest, threads: int | None = None) -> None:
        if manifest.dtype not in DTYPES:
            raise EngineUnavailableError(
                f"the bundle is {manifest.dtype}, which ONNX Runtime does not compute on a CPU: use the torch engine "
                "(swiftvideo.export.restore.open_torch, or --engine torch), the TensorRT engine on a GPU, or export it "
                "with --dtype fp32"
            )
        most = MOST_THREADS * usable_cores()
        if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= most):
            raise UsageError(
                f"threads is {threads!r}: use 1 to {most}, {MOST_THREADS} for every core that this process may use, "
                "or None for every core"
            )
        self.geometry: Geometry = manifest.geometry
        self.dtype = DTYPES[manifest.dtype]
        self.threads = threads or usable_cores()
        self._sessions = _open_graphs(manifest, self.threads)
        self.vae_inputs = [name for name in self._inputs("decode") if name != "latents"]

    def encode(self, ids: Int64, mask: Int64, text: str) -> Prompt:
        """See `Engine.encode`."""
        (embeds,) = self.run("text_encoder", ["embeds"], {"ids": ids, "mask": mask})
        return self.condition(embeds, text)

    def condition(self, embeds: Float32, text: str = "") -> Prompt:
        """See `Engine.condition`."""
        outputs = ["cross_k", "cross_v", "signature"]
        cross_k, cross_v, signature = self.run("condition", outputs, {"embeds": embeds.astype(self.dtype)})
        return Prompt(text, signature.astype(np.float32), (cross_k, cross_v))

    def open(self, batch: int = 1) -> OnnxRuntimeSession:
        """See `Engine.open`."""
        return OnnxRuntimeSession(self, batch)

    def run(self, graph: str, outputs: list[str] | None, feeds: dict[str, Array]) -> list[Array]:
        """Run a graph. Raises EngineError with ONNX Runtime's message when it fails."""
        session = self.session(graph)
        try:
            results: list[Array] = session.run(outputs, feeds)
        except Exception as error:  # its exceptions share no base class
            raise _failure(f"ONNX Runtime failed in {graph}", error) from error
        return results

    def session(self, graph: str) -> Any:
        """The `onnxruntime.InferenceSession` of a graph."""
        try:
            return self._sessions[graph]
        except KeyError:
            if not self._sessions:
                raise ClosedError("this engine was closed: load the bundle again") from None
            raise BundleError(
                f"the bundle has no graph {graph!r}, only {', '.join(self._sessions)}: export the whole model"
            ) from None

    def close(self) -> None:
        """See `Engine.close`."""
        self._sessions = {}

    def _inputs(self, graph: str) -> list[str]:
        return [item.name for item in self._sessions[graph].get_inputs()] if graph in self._sessions else []


class OnnxRuntimeSession:
    """Tensors of one session (see `swiftvideo.runtime.engine.EngineSession`)."""

    def __init__(self, engine: OnnxRuntimeEngine, batch: int) -> None:
        self._engine = engine
        self._batch = batch
        self._cache: HostCache | None = HostCache(engine.geometry, batch, engine.dtype)
        self._latents: Float32 | None = None
        self._x0: Float32 | None = None
        self._fresh: list[Array] = []
        self._vae: list[Any] | None = None

    def load(self, latents: Float32) -> None:
        """See `EngineSession.load`."""
        self._latents = np.ascontiguousarray(latents, np.float32)

    def denoise(
        self,
        step: int,
        noise: Float32 | None,
        time_cos: Float32,
        time_sin: Float32,
        segments: Int32,
        prompt: Prompt,
    ) -> None:
        """See `EngineSession.denoise`."""
        cache, latents = self._open(), self._latents
        if latents is None:
            raise UsageError("no latents are loaded: call load() first")
        feeds = {
            "latents": latents,
            "noise": latents if noise is None else noise,
            "step": np.array(step, np.int64),
            "time_cos": self._per_item(time_cos),
            "time_sin": self._per_item(time_sin),
            "cache_k": cache.k,
            "cache_v": cache.v,
            "segments": self._per_item(segments),
            "cross_k": prompt.cross[0],
            "cross_v": prompt.cross[1],
        }
        if noise is None:
            outputs = ["x0", "fresh_k", "fresh_v"]
            self._x0, *self._fresh = self._engine.run("denoise", outputs, feeds)
            self._latents = self._x0
        else:  # every output that is asked for is copied
            self._x0, self._latents = self._engine.run("denoise", ["x0", "next_latents"], feeds)
            self._fresh = []

    def x0(self) -> Float32:
        """See `EngineSession.x0`."""
        if self._x0 is None:
            raise UsageError("nothing was denoised yet: call denoise() first")
        return self._x0

    def commit(self, ranges: Int32) -> None:
        """See `EngineSession.commit`."""
        if not self._fresh:
            raise UsageError("there is nothing to commit: call denoise() without noise first")
        self._open().commit(ranges, *self._fresh)

    def inject(
        self, spans: Int32, old: Float32, new: Float32, rho: Float32, mix: float
    ) -> tuple[Float32, Float32]:
        """See `EngineSession.inject`."""
        feeds = {
            "cache_v": self._open().v,
            "spans": self._per_item(spans),
            "old_signature": old,
            "new_signature": new,
            "rho": rho,
            "mix": np.full(self._batch, mix, np.float32),
        }
        bridge, anchor = self._engine.run("inject", ["bridge", "anchor"], feeds)
        return bridge.astype(np.float32, copy=False), anchor.astype(np.float32, copy=False)

    def write_memory(self, row: int, tokens: Float32) -> None:
        """See `EngineSession.write_memory`."""
        self._open().write_memory(row, tokens)

    def place_sink(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_sink`."""
        self._open().place_sink(cos, sin)

    def place_memory(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_memory`."""
        self._open().place_memory(cos, sin)

    def decode(self, latents: Float32) -> Frames:
        """See `EngineSession.decode`."""
        self._open()
        frames, names = [], self._engine.vae_inputs
        outputs = ["frames", *(f"new_{name}" for name in names)]
        if self._vae is None:
            first = np.ascontiguousarray(latents[:, :1])
            made, *self._vae = self._engine.run("decode_first", outputs, {"latents": first})
            frames.append(made)
            latents = latents[:, 1:]
        if latents.shape[1]:
            feeds = {"latents": np.ascontiguousarray(latents), **dict(zip(names, self._vae, strict=True))}
            made, *self._vae = self._engine.run("decode", outputs, feeds)
            frames.append(made)
        return frames[0] if len(frames) == 1 else np.concatenate(frames, 1)

    def export_state(self) -> dict[str, Array]:
        """See `EngineSession.export_state`."""
        state = self._open().export_state()
        names = self._engine.vae_inputs
        return state | dict(zip(names, self._vae or [], strict=self._vae is not None))

    def import_state(self, state: dict[str, Array]) -> None:
        """See `EngineSession.import_state`."""
        names = self._engine.vae_inputs
        inputs = (
            [item for item in self._engine.session("decode").get_inputs() if item.name in names]
            if names
            else []
        )
        # The one axis that is no number is the batch.
        shapes = {i.name: tuple(n if isinstance(n, int) else self._batch for n in i.shape) for i in inputs}
        self._open().import_state(state, shapes)
        self._vae = [
            floats(state[i.name]).astype(ORT_DTYPES[i.type]) for i in inputs if i.name in state
        ] or None

    def close(self) -> None:
        """See `EngineSession.close`."""
        self._cache = self._latents = self._x0 = self._vae = None
        self._fresh = []

    def _open(self) -> HostCache:
        if self._cache is None:
            raise ClosedError("this session was closed: open a new one")
        return self._cache

    def _per_item(self, value: Array) -> Array:
        """The same for every item of the batch: [B, ...]."""
        return np.ascontiguousarray(np.broadcast_to(value, (self._batch, *value.shape)))


def _open_graphs(manifest: Manifest, threads: int) -> dict[str, Any]:
    """An `InferenceSession` for every graph of the bundle, from verified bytes."""
    data = [name for name in manifest.files if name.endswith(".data")]
    blobs: dict[str, memoryview] = {}  # kept until all graphs are made: graphs may share weights
    sessions = {}
    for graph in GRAPHS:
        name = f"onnx/{graph}.onnx"
        if not manifest.has(name):
            continue
        model = bytes(manifest.read_file(name))
        used = [item for item in data if PurePosixPath(item).name.encode() in model]
        for item in used:
            if item not in blobs:
                blobs[item] = manifest.read_file(item)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Each graph has threads of its own: those of one must not spin while another runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Nothing but what was verified: it would look for weights of inner graphs in the current folder, and take what
        # has its own format for a graph. Nor may it try again, and say so on stdout.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        options.add_session_config_entry("session.load_model_format", "ONNX")
        if used:
            buffers = [blobs[item] for item in used]
            options.add_external_initializers_from_files_in_memory(
                [PurePosixPath(item).name for item in used], buffers, [len(buffer) for buffer in buffers]
            )
        try:
            sessions[graph] = ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:
            raise _failure(f"ONNX Runtime cannot open {name} of the bundle", error) from error
    return sessions


def _failure(what: str, error: Exception) -> EngineError:
    """ONNX Runtime's error as one of ours. It tells of missing memory only in words."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        return OutOfMemoryError(
            f"{what}: no memory ({text}); close other sessions, or use a smaller model or resolution"
        )
    return EngineError(f"{what}: {text}; 'swiftvideo verify BUNDLE' checks the graphs")
