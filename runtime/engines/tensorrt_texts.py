"""Prompts on the TensorRT engine: the text graphs, with contexts and buffers that are made once.

A context takes its time, and freeing device memory waits for every stream: neither belongs into a prompt switch.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from swiftvideo.runtime.engine import Prompt
from swiftvideo.runtime.plugins.launch import check

from .cuda import Arena, Pinned, to_bits

if TYPE_CHECKING:
    from .tensorrt import TensorRTEngine

Array = NDArray[Any]
Shape = tuple[int, ...]


class Texts:
    """The graphs that make prompts. Any thread may use it."""

    def __init__(self, engine: TensorRTEngine) -> None:
        self._engine, self._driver, self._lock = engine, engine.driver, threading.Lock()
        graphs = [graph for graph in ("text_encoder", "condition") if graph in engine.networks]
        tensors = {n: engine.described(graph, n, {0: 1}) for graph in graphs for n in engine.inputs(graph)}
        tensors["signature"] = ((1, engine.geometry.dim), "fp32")
        with ExitStack() as made:
            self._stream = engine.stream(made)
            self._work = made.enter_context(
                closing(Arena(engine.driver, tensors, self._stream, "encoding prompts"))
            )
            self._staging = made.enter_context(closing(Pinned(engine.driver, self._work.size)))
            scratch = made.enter_context(
                closing(
                    Arena(
                        engine.driver, {"scratch": engine.scratch(*graphs)}, self._stream, "encoding prompts"
                    )
                )
            )
            self._contexts: dict[str, Any] = {
                graph: engine.context(graph, scratch, "scratch") for graph in graphs
            }
            self._made = made.pop_all()

    def prompt(self, text: str, feeds: dict[str, Array], *graphs: str) -> Prompt:
        """Run graphs one after the other; K and V of the text stay on the GPU as long as the prompt lives."""
        engine, g, driver = self._engine, self._engine.geometry, self._driver
        cross = (g.layers, 1, g.text_len, g.heads, g.head_dim)
        with self._lock:  # `close` waits for it
            for graph in graphs:
                engine.network(graph)  # is there, and the engine is open
            engine.enter()
            tensors = {"cross_k": (cross, engine.dtype), "cross_v": (cross, engine.dtype)}
            kept = Arena(driver, tensors, self._stream, "a prompt")
            try:
                signature = self._run(feeds, graphs, kept)
            except BaseException:
                kept.close()
                raise
        weakref.finalize(kept, _free, driver, engine.context_handle, kept["cross_k"]).atexit = False
        return Prompt(text, signature, kept)

    def _run(self, feeds: dict[str, Array], graphs: tuple[str, ...], kept: Arena) -> Array:
        """The signature; `kept` has the K and V afterwards."""
        engine, driver, work, stream = self._engine, self._driver, self._work, self._stream
        for name, value in feeds.items():
            size = self._staging.put(to_bits(value, work.tensors[name][1]))
            code = driver.cuMemcpyHtoDAsync(work[name], self._staging.address, size, stream)
            check(driver, code, "copying a prompt")
            check(driver, driver.cuStreamSynchronize(stream), "copying a prompt")
        for graph in graphs:
            tensors: dict[str, tuple[int, Shape | None]] = {
                n: (work[n], work.tensors[n][0]) for n in engine.inputs(graph)
            }
            made = ["embeds"] if graph == "text_encoder" else ["cross_k", "cross_v", "signature"]
            tensors |= {n: ((kept if n.startswith("cross") else work)[n], None) for n in made}
            engine.bind(self._contexts[graph], tensors)
            engine.execute(self._contexts[graph], stream)
        size = work.bytes_of("signature")
        code = driver.cuMemcpyDtoHAsync(self._staging.address, work["signature"], size, stream)
        check(driver, code, "copying back")
        check(driver, driver.cuStreamSynchronize(stream), "encoding a prompt")
        return self._staging.take(*work.tensors["signature"])

    def close(self) -> None:
        """Free everything but prompts that live."""
        with self._lock:
            self._contexts = {}
            self._made.close()


def _free(driver: Any, context: Any, address: int) -> None:
    """Free a prompt's memory, in whatever thread its last reference went."""
    check(driver, driver.cuCtxPushCurrent(context), "freeing a prompt")
    try:
        check(driver, driver.cuMemFree(address), "freeing a prompt")
    finally:
        check(driver, driver.cuCtxPopCurrent(), "freeing a prompt")
