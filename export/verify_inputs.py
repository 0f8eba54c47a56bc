"""Inputs that the graphs of a bundle are compared on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from swiftvideo.runtime.geometry import Geometry
from swiftvideo.runtime.positions import time_tables

from .graphs import Decode, Graph, input_names

Case = tuple[str, dict[str, Tensor]]
"""What it is, and the graph's inputs by name."""

Rows = list[tuple[int, int]]
"""(start, length) of rows: cache rows first, then the fresh ones."""


def cases(graph: Graph, geometry: Geometry, generator: torch.Generator) -> Iterator[Case]:
    """Cases of a graph, in the dtypes of its example inputs; random, but the same for the same generator."""
    make = _Inputs(graph, geometry, generator)
    return {
        "text_encoder": make.text_encoder,
        "condition": make.condition,
        "denoise": make.denoise,
        "inject": make.inject,
        "decode_first": make.decode_first,
        "decode": make.decode,
    }[graph.name]()


def segment_tables(g: Geometry, frames: int) -> dict[str, Rows]:
    """Tables of up to six segments that a forward of `frames` frames may have."""
    tokens, ring = g.frame_tokens, g.memory_rows + g.sink * g.frame_tokens
    size, fresh = (g.window - g.sink) * tokens, (g.rows, frames * tokens)
    half = tokens // 2
    turn = size // 2 + 1
    return {
        "empty cache": [fresh],
        "wrapped ring, bridge, anchors": [
            (0, g.memory_rows),
            (g.memory_rows, g.sink * tokens),
            (ring + turn, size - turn),
            (ring, turn - half - 1),
            (g.rows, half),
            (g.rows + half, frames * tokens - half),
        ],
        "cut frame": [
            (1, 1),
            (g.memory_rows, g.sink * tokens),
            (ring + half, size - half),
            (g.rows + half, frames * tokens - half),
        ],
    }


class _Inputs:
    def __init__(self, graph: Graph, geometry: Geometry, generator: torch.Generator) -> None:
        self.graph, self.g, self.generator = graph, geometry, generator
        tensors = [
            item
            for value in graph.inputs.values()
            for item in (value if isinstance(value, list) else [value])
        ]
        self.caches: dict[str, Tensor] = {}
        self.like = dict(zip(input_names(graph), tensors, strict=True))

    def normal(self, name: str, **axes: int) -> Tensor:
        """Standard normal in the shape of the example input `name`, but with other sizes: batch, or axis_N."""
        shape = list(self.like[name].shape)
        for axis, size in axes.items():
            shape[int(axis.removeprefix("axis_"))] = size
        return torch.randn(shape, generator=self.generator).to(self.like[name].dtype)

    def lengths(self) -> Tensor:
        """Masks of a short and of a full prompt, int64 [2,T]."""
        text = self.g.text_len
        return (torch.arange(text) < torch.tensor([[max(1, text // 3)], [text]])).long()

    def text_encoder(self) -> Iterator[Case]:
        mask = self.lengths()
        vocabulary = int(self.graph.config["text_encoder"]["vocab_size"])
        ids = torch.randint(0, vocabulary, tuple(mask.shape), generator=self.generator) * mask
        yield "short and full prompt", {"ids": ids, "mask": mask}

    def condition(self) -> Iterator[Case]:
        embeds = self.normal("embeds", axis_0=2)
        yield "short and full prompt", {"embeds": embeds * self.lengths().unsqueeze(-1).to(embeds.dtype)}

    def denoise(self) -> Iterator[Case]:
        g = self.g
        for name in ("cache_k", "cache_v", "cross_k", "cross_v"):  # large, so the same for all cases
            self.caches[name] = self.normal(name, axis_1=2)
        tables = segment_tables(g, g.chunk)
        names = list(tables)
        for step in range(g.steps + 1):
            name = names[step % len(names)]
            label = f"step {step}" if step < g.steps else "context pass"
            yield f"{label}, {name}", self._forward(step, g.chunk, 30 * step, [tables[name]])
        both = [tables[names[0]], tables[names[1]]]
        yield "step 0, two sessions", self._forward(0, g.chunk, 1000, both)
        yield (
            f"recache of {g.window} frames",
            self._forward(g.steps, g.window, 3, [[(2, 1), (g.rows, g.window * g.frame_tokens)]]),
        )

    def _forward(self, step: int, frames: int, start: int, tables: list[Rows]) -> dict[str, Tensor]:
        batch = len(tables)
        segments = torch.zeros(batch, 6, 2, dtype=torch.int32)
        for item, rows in enumerate(tables):
            segments[item, : len(rows)] = torch.tensor(rows)
        cos, sin = (
            torch.from_numpy(table).expand(batch, -1, -1).contiguous()
            for table in time_tables(start, frames, self.g.time_pairs)
        )
        chunk = {name: self.normal(name, axis_0=batch, axis_1=frames) for name in ("latents", "noise")}
        caches = {name: value[:, :batch] for name, value in self.caches.items()}
        times = {"time_cos": cos, "time_sin": sin}
        return chunk | caches | times | {"step": torch.tensor(step), "segments": segments}

    def inject(self) -> Iterator[Case]:
        first, tokens = self.g.memory_rows, self.g.frame_tokens
        end = self.g.rows - self.g.rows // 3  # the ring's newest row is somewhere in the middle
        sink = (first, self.g.sink * tokens)
        ring = (first + sink[1], self.g.rows)
        pieces = [(end - tokens, tokens), (ring[1] - tokens - tokens // 2, tokens + tokens // 2)]
        many = [[pieces[0]], [(end - 2 * tokens, tokens)], pieces, [sink], [pieces[0], pieces[1]]]
        one: list[Rows] = [[(first, tokens)], [], [(first, tokens)], [(first, tokens)], [(first, tokens)]]
        no_sink: list[Rows] = [*many[:3], [], many[4]]
        yield "many frames", self._inject([many])
        yield "one frame, and no sink", self._inject([one, no_sink])

    def _inject(self, spans: list[list[Rows]]) -> dict[str, Tensor]:
        batch = len(spans)
        table = torch.zeros(batch, 5, 3, 2, dtype=torch.int32)
        for item, ranges in enumerate(spans):
            for index, rows in enumerate(ranges):
                if rows:
                    table[item, index, : len(rows)] = torch.tensor(rows)
        rho, mix = (torch.rand(batch, generator=self.generator) for _ in range(2))
        signatures = {name: self.normal(name, axis_0=batch) for name in ("old_signature", "new_signature")}
        return {
            "cache_v": self.normal("cache_v", axis_1=batch),
            "spans": table,
            **signatures,
            "rho": rho,
            "mix": mix,
        }

    def decode_first(self) -> Iterator[Case]:
        yield "first frame", {"latents": self.normal("latents", axis_0=1)}

    def decode(self) -> Iterator[Case]:
        module = self.graph.module
        assert isinstance(module, Decode)
        with torch.no_grad():
            _, caches = module.decoder.decode_first(self.normal("latents", axis_0=1, axis_1=1))
        held = {f"vae_cache_{index}": cache for index, cache in enumerate(caches)}
        for frames in {self.g.chunk - 1 or 1: None, self.g.chunk: None}:
            yield f"{frames} frames", {"latents": self.normal("latents", axis_0=1, axis_1=frames), **held}
