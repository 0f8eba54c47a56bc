"""The kernels' numbers, in Triton's interpreter on the CPU, against float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from swiftvideo.runtime.positions import rotation

from .interpreter import Interpreter

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of values around 1: float32 sums, and one rounding of the weights and of the result to the dtype.
TOLERANCE = {"fp32": 3e-6, "fp16": 2e-3, "bf16": 1.6e-2}
CACHE, LAYERS = 50, 2


@dataclass(frozen=True)
class Case:
    """Shapes and segments of one attention."""

    name: str
    segments: list[list[tuple[int, int]]]
    """Per item."""
    queries: int = 21
    heads: int = 2
    head: int = 16
    dtypes: tuple[str, ...] = ("fp32",)
    scale: float = 1.0
    """Of the logits, on top of 1 / sqrt(head)."""
    tiles: tuple[int, int] = field(default=(16, 16))
    split: tuple[int, int] = (0, 1)
    """Last tiles that are computed in pieces, and pieces of each."""


WINDOW = [(0, 2), (8, 6), (19, 31), (14, 5), (50, 21)]
CASES = [
    Case("a whole window", [WINDOW], dtypes=("fp32", "fp16", "bf16")),
    Case("two items, each its own window", [WINDOW, [(3, 7), (60, 11)]]),
    Case("one key", [[(17, 1)]], dtypes=("fp32", "bf16")),
    Case("one fresh key, the last", [[(70, 1)]]),
    Case("all rows in one segment", [[(0, 71)]]),
    Case("whole blocks alone, on both sides of the border", [[(18, 48)]], dtypes=("fp32", "bf16")),
    Case("two segments across the border", [[(10, 50), (0, 0), (33, 31)]], dtypes=("fp32", "bf16")),
    Case("six full segments", [[(0, 16), (16, 16), (32, 16), (48, 2), (50, 16), (66, 5)]]),
    Case("empty segments between", [[(0, 0), (5, 3), (0, 0), (0, 0), (50, 4), (0, 0)]]),
    Case("a partial frame at either end", [[(0, 2), (9, 13), (33, 1), (57, 9)]], queries=20),
    Case("rows twice are keys twice", [[(4, 3), (4, 3), (4, 20)]]),
    Case("one query", [[(0, 9), (50, 1)]], queries=1),
    Case("a whole tile of queries", [WINDOW], queries=32),
    Case("blocks of keys wider than any segment", [WINDOW], tiles=(16, 64)),
    Case("blocks of queries wider than there are", [WINDOW], tiles=(64, 16)),
    Case("all tiles in two pieces", [WINDOW], dtypes=("fp32", "fp16", "bf16"), split=(4, 2)),
    Case("the last tile in three pieces", [WINDOW], dtypes=("fp32", "bf16"), split=(1, 3)),
    Case("tiles of two items in pieces", [WINDOW, [(18, 48)]], split=(5, 2)),
    Case("more pieces than blocks", [WINDOW], split=(3, 8)),
    Case("pieces where nothing is whole", [[(3, 9), (60, 11)]], split=(4, 3)),
    Case("pieces of one key", [[(17, 1)]], split=(4, 4)),
    Case("pieces of heads of 24", [WINDOW], head=24, heads=3, dtypes=("fp32", "bf16"), split=(4, 2)),
    Case("pieces, huge logits", [WINDOW], scale=1e4, dtypes=("fp32", "bf16"), split=(4, 3)),
    Case("pieces of a tile of more queries than there are", [WINDOW], tiles=(64, 16), split=(2, 3)),
    Case("heads of 8", [WINDOW], head=8, dtypes=("fp32", "fp16")),
    Case("heads of 24", [WINDOW], head=24, heads=3, dtypes=("fp32", "bf16")),
    Case("heads of 40", [WINDOW], head=40),
    Case("heads of 128", [WINDOW], head=128, heads=1, dtypes=("fp32", "bf16")),
    Case("huge logits", [WINDOW], scale=1e4, dtypes=("fp32", "fp16", "bf16")),
    Case("tiny logits", [WINDOW], scale=1e-6),
]


def tensors(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, fresh_k, fresh_v, cache_k, cache_v, segments; rows that are no keys hold NaN."""
    generator = torch.Generator().manual_seed(len(case.name))
    batch = len(case.segments)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    fresh = [normal(batch, case.queries, case.heads, case.head) for _ in range(3)]
    cache = [normal(LAYERS, batch, CACHE, case.heads, case.head) for _ in range(2)]
    table = torch.zeros(batch, 6, 2, dtype=torch.int32)
    for item, segments in enumerate(case.segments):
        used = torch.zeros(CACHE + case.queries, dtype=torch.bool)
        for index, (start, length) in enumerate(segments):
            table[item, index] = torch.tensor([start, length])
            used[start : start + length] = True
        for tensor in fresh[1:]:
            tensor[item, ~used[CACHE:]] = float("nan")
        for tensor in cache:
            tensor[1, item, ~used[:CACHE]] = float("nan")
    return (*fresh, *cache, table)


def softmax_in_float64(given: tuple[Tensor, ...], layer: int, scale: float) -> np.ndarray:
    """Attention written out in numpy: gather, exponentials, sums. [B,N,n,d]."""
    q, fresh_k, fresh_v, cache_k, cache_v, table = (x.double().numpy() for x in given)
    out = np.zeros_like(q)
    for item in range(len(q)):
        rows = np.concatenate([np.arange(a, a + n) for a, n in table[item].astype(int)])
        k = np.concatenate((cache_k[layer, item], fresh_k[item]))[rows]
        v = np.concatenate((cache_v[layer, item], fresh_v[item]))[rows]
        logits = np.einsum("qhd,khd->hqk", q[item], k) * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[item] = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
    return out


@pytest.mark.parametrize(
    ("case", "name"), [(c, d) for c in CASES for d in c.dtypes], ids=lambda x: getattr(x, "name", x)
)
def test_attention(interpreter: Interpreter, case: Case, name: str, record_property: object) -> None:
    given = tensors(case, DTYPES[name])
    scale = case.scale * case.head**-0.5
    queries, keys = case.tiles
    seen = (
        interpreter.attention(*given, 1, scale, queries=queries, keys=keys, split=case.split).double().numpy()
    )
    error = np.abs(seen - softmax_in_float64(given, 1, scale)).max()
    record_property("error", float(error))  # type: ignore[operator]
    # Logits of 1e4 leave float32 products an absolute error of 1e-3, which the exponential passes on.
    assert error < TOLERANCE[name] * (300 if case.scale > 1 and name == "fp32" else 1)


def test_attention_of_no_keys_is_zero(interpreter: Interpreter) -> None:
    given = tensors(Case("nothing", [[]]), torch.float32)
    for split in ((0, 1), (4, 3)):
        assert not interpreter.attention(*given, 0, 0.25, split=split).any()


WILD = [(-7, 12), (30, 1 << 30), (1 << 30, 1 << 30), (20, -5), (-(1 << 31), (1 << 31) - 1), (69, 3)]
"""As memory may hold them that nobody has written."""


def cut(pair: tuple[int, int], rows: int) -> tuple[int, int]:
    start = min(max(pair[0], 0), rows)
    return start, min(max(pair[1], 0), rows - start)


def test_tables_never_reach_beyond_the_rows(interpreter: Interpreter) -> None:
    given = tensors(Case("wild", [[(0, CACHE + 21)]]), torch.float32)
    wild, tame = torch.tensor([WILD]), torch.tensor([[cut(pair, CACHE + 21) for pair in WILD]])
    wild, tame = (table.to(torch.int32) for table in (wild, tame))
    seen = interpreter.attention(*given[:5], wild, 1, 0.25).double().numpy()
    assert np.abs(seen - softmax_in_float64((*given[:5], tame), 1, 0.25)).max() < TOLERANCE["fp32"]
    values = torch.randn(1, 1, CACHE, 2, 16, generator=torch.Generator().manual_seed(9))
    signatures, one = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(10)), torch.ones(1)
    both = [
        interpreter.injection(values, torch.tensor([[table[:3]] * 5]).to(torch.int32), *signatures, one, one)
        for table in (WILD, [cut(pair, CACHE) for pair in WILD])
    ]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


SPANS = {
    "all spans": [[(20, 10)], [(10, 10)], [(20, 10), (5, 3)], [(0, 9)], [(14, 16), (3, 2), (40, 10)]],
    "fewer than two frames": [[(20, 10)], [], [(20, 10)], [(20, 3)], [(20, 10)]],
    "no sink": [[(20, 10)], [(10, 10)], [(10, 20)], [], [(10, 20)]],
    "one row each": [[(49, 1)], [(0, 1)], [(49, 1)], [(0, 1)], [(49, 1)]],
    "nothing moved": [[(10, 8)], [(10, 8)], [(2, 40)], [(0, 5)], [(2, 40)]],
    "next to nothing moved": [[(12, 1)], [(11, 1)], [(2, 40)], [(0, 5)], [(2, 40)]],
    "the same prompt": [[(20, 10)], [], [(20, 10)], [(20, 3)], [(20, 10)]],
}


def injection_in_float64(
    v: np.ndarray,
    spans: list[list[tuple[int, int]]],
    old: np.ndarray,
    new: np.ndarray,
    rho: float,
    mix: float,
) -> tuple[np.ndarray, np.ndarray]:
    """algorithm.md, sections 5 and 6, for one item and layer: v [R,n,d], signatures [n,d]."""

    def mean(ranges: list[tuple[int, int]]) -> np.ndarray | None:
        rows = [row for start, length in ranges for row in range(start, start + length)]
        return v[rows].mean(0) if rows else None

    last, before, recent, sink, tail = map(mean, spans)
    assert last is not None and recent is not None and tail is not None
    delta = new - old
    if before is not None:
        mu = last - before
        square = (mu * mu).sum(-1, keepdims=True)
        delta = np.where(
            square > 1e-6, delta - (delta * mu).sum(-1, keepdims=True) / (square + 1e-6) * mu, delta
        )
    tokens = []
    for base in (recent if sink is None else sink, recent):
        norms = [np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6) for x in (base, delta)]
        gate = rho * np.clip((base * delta).sum(-1, keepdims=True) / (norms[0] * norms[1]), 0, 1)
        tokens.append((1 - gate) * base + gate * delta)
    return np.stack(tokens), ((1 - mix) * tail + mix * old)[None]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("head", [16, 24])
def test_injection(interpreter: Interpreter, spans: str, name: str, head: int) -> None:
    batch, heads = 2, 3
    generator = torch.Generator().manual_seed(5)
    cache = torch.randn(LAYERS, batch, CACHE, heads, head, generator=generator).to(DTYPES[name])
    old, new = torch.randn(2, batch, heads * head, generator=generator)
    rho, mix = torch.rand(2, batch, generator=generator)
    if spans == "next to nothing moved":
        cache[:, :, 12] = cache[:, :, 11] + 1.8e-4
    if spans == "the same prompt":
        new = old.clone()
    table = torch.zeros(batch, 5, 3, 2, dtype=torch.int32)
    for which, ranges in enumerate(SPANS[spans]):
        for index, pair in enumerate(ranges):
            table[:, which, index] = torch.tensor(pair)
    bridge, anchor = interpreter.injection(cache, table, old, new, rho, mix)
    for layer in range(LAYERS):
        for item in range(batch):
            expected = injection_in_float64(
                cache[layer, item].double().numpy(),
                SPANS[spans],
                old[item].double().numpy().reshape(heads, head),
                new[item].double().numpy().reshape(heads, head),
                float(rho[item]),
                float(mix[item]),
            )
            for seen, wanted in zip((bridge, anchor), expected, strict=True):
                error = np.abs(seen[layer, item].double().numpy() - wanted).max()
                assert error < TOLERANCE[name]


@pytest.mark.parametrize("name", DTYPES)
def test_commit_copies_the_ranges_and_nothing_else(interpreter: Interpreter, name: str) -> None:
    generator = torch.Generator().manual_seed(6)
    fresh = [torch.randn(LAYERS, 2, 21, 2, 24, generator=generator).to(DTYPES[name]) for _ in range(2)]
    cache = [torch.randn(LAYERS, 2, CACHE, 2, 24, generator=generator).to(DTYPES[name]) for _ in range(2)]
    ranges = torch.tensor([[3, 40, 10], [13, 8, 8], [0, 30, 1], [0, 0, 0]], dtype=torch.int32)
    wanted = [item.clone() for item in cache]
    for start, row, length in ranges.tolist():
        for target, source in zip(wanted, fresh, strict=True):
            target[:, :, row : row + length] = source[:, :, start : start + length]
    seen = interpreter.commit((fresh[0], fresh[1]), (cache[0], cache[1]), ranges)
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("frames", [0, 7, 10_000_000])
def test_place_rotates_time_pairs(interpreter: Interpreter, name: str, frames: int) -> None:
    head, pairs, first, count = 24, 4, 5, 19
    generator = torch.Generator().manual_seed(7)
    source = torch.randn(LAYERS, 2, count, 2, head, generator=generator).to(DTYPES[name])
    target = torch.randn(LAYERS, 2, CACHE, 2, head, generator=generator).to(DTYPES[name])
    cos, sin = rotation(frames, pairs)
    seen = interpreter.place(
        source, target, *(torch.from_numpy(x.astype(np.float32)) for x in (cos, sin)), first, count
    )
    value = source.double().numpy()
    turned = value.copy()
    for pair in range(pairs):
        turned[..., 2 * pair] = value[..., 2 * pair] * cos[pair] - value[..., 2 * pair + 1] * sin[pair]
        turned[..., 2 * pair + 1] = value[..., 2 * pair] * sin[pair] + value[..., 2 * pair + 1] * cos[pair]
    placed = seen[:, :, first : first + count].double().numpy()
    assert np.abs(placed - turned).max() < {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}[name]
    if frames == 0:
        assert torch.equal(seen[:, :, first : first + count], source)
    seen[:, :, first : first + count] = target[:, :, first : first + count]
    assert torch.equal(seen, target)


def test_rows_may_be_placed_onto_themselves(interpreter: Interpreter) -> None:
    rows = torch.randn(LAYERS, 1, 9, 2, 16, generator=torch.Generator().manual_seed(8))
    quarter = (torch.zeros(3), torch.ones(3))
    seen = interpreter.place(rows, rows, *quarter, 0, 9)
    assert torch.equal(seen[..., 0:6:2], -rows[..., 1:6:2])
    assert torch.equal(seen[..., 1:6:2], rows[..., 0:6:2])
