"""Part: what a strand computes between two requests; and a model's parts in order."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenweave.cost.hardware import Hardware
from tokenweave.cost.ops import Attention, Gemm
from tokenweave.cost.shape import LayerShape, ModelShape, RankShape, shard_shape

SITES = {"attn": 0, "qk_norm": 0, "mlp": 1, "embed": 1, "head": 1}  # which of a choice's two SM counts a request gets
Request = tuple[float, bool]  # bytes of a gathered row, 0 of a sum; whether only rows that make logits go on
LONGEST_PATTERN = 8  # layers after which a model's kinds of layers may repeat


@dataclass(frozen=True, eq=False)  # a part is itself, however like another it is
class Part:
    """A compute segment and the request that ends it, as one rank runs them.

    gemms run on the rows that come in, live_gemms on those that go on. row_bytes: what all other kernels move, a row.
    site: "embed", "attn", "mlp": the request is a sum; "qk_norm", "head": a gather of gather_bytes a row.
    comes_wanted, goes_wanted: only the rows that make logits come in, or go on.
    """

    site: str
    gemms: tuple[Gemm, ...]
    live_gemms: tuple[Gemm, ...]
    row_bytes: float
    kernels: int
    window: int | None = None
    attends: bool = False
    gather_bytes: float = 0.0
    comes_wanted: bool = False
    goes_wanted: bool = False

    @functools.cached_property
    def gathers(self) -> bool:
        return self.site in ("qk_norm", "head")

    @functools.cached_property
    def request(self) -> Request:
        """What of its request counts: two parts with the same send the same."""
        return self.gather_bytes, self.goes_wanted


@dataclass(frozen=True)
class Block:
    """Parts of one or a few layers, `repeats` times."""

    parts: tuple[Part, ...]
    repeats: int


@dataclass(frozen=True)
class Turn:
    """In a woven step the first half computes `part` beside the second half's request that ended `before` (None: there
    is none yet), and the second half computes it beside the first's that has just ended `part`; so often."""

    part: Part
    before: Part | None
    times: int


def turns_of(blocks: Sequence[Block]) -> list[Turn]:
    """A woven step's turns; the same one, wherever it stands, once."""
    turns: dict[Any, Turn] = {}
    last: Part | None = None
    for block in blocks:
        for repeats, first in ((1, last), (block.repeats - 1, block.parts[-1])):
            for part, before in zip(block.parts, (first, *block.parts)):
                key = part, before and (before.request, SITES[before.site])
                turn = turns.get(key, Turn(part, before, 0))
                turns[key] = replace(turn, times=turn.times + repeats)
        last = block.parts[-1]
    return [turn for turn in turns.values() if turn.times]


class ModelParts:
    """A model's parts on one of W ranks. drops_rows: as the runtime does, the last layer's attention output and MLP run
    on the rows that make logits alone."""

    def __init__(self, shape: ModelShape, hardware: Hardware, world_size: int, drops_rows: bool):
        self.shape, self.hardware, self.drops_rows = shape, hardware, drops_rows
        self._gemms: dict[tuple[int, int, int, int], Gemm] = {}
        self.rank = shard_shape(shape, world_size)
        self.kinds = dict(zip(shape.layers, self.rank.intermediate_sizes, strict=True))
        self._mlps: dict[LayerShape, Part] = {}
        layers = {kind: self._layer(kind, size) for kind, size in self.kinds.items()}
        whole = shape.layers[:-1] if drops_rows else shape.layers
        blocks = [Block(sum((layers[kind] for kind in kinds), ()), times) for kinds, times in repeated(whole)]
        if drops_rows:
            blocks.append(Block(_dropping(layers[shape.layers[-1]]), 1))
        self.blocks = (Block((self._embed(),), 1), *blocks, Block((self._head(),), 1))
        self.turns = turns_of(self.blocks)

    def attention(self, window: int | None) -> Attention:
        """One rank's attention with that window."""
        rank, shape = self.rank, self.shape
        return Attention(rank.heads, rank.kv_heads, shape.head_dim, window, self.hardware, shape.dtype)

    @property
    def windows(self) -> set[int | None]:
        return {kind.window for kind in self.kinds}

    def _gemm(self, n: int, k: int, layer: LayerShape | None = None) -> Gemm:
        """Alike ones are one."""
        key = (n, k, layer.experts, layer.top_k) if layer else (n, k, 0, 1)
        if key not in self._gemms:
            self._gemms[key] = Gemm(n, k, self.hardware, self.shape.dtype, *key[2:])
        return self._gemms[key]

    @property
    def gemms(self) -> Iterable[Gemm]:
        return self._gemms.values()

    def _embed(self) -> Part:
        return Part("embed", (), (), 2 * self.shape.hidden_size * self.shape.dtype_bytes, kernels=2)

    def _head(self) -> Part:
        logits = self._gemm(self.rank.vocab_size, self.shape.hidden_size)
        gathered = self.shape.vocab_size * self.shape.dtype_bytes
        return Part("head", (logits,), (), 0.0, 1, gather_bytes=gathered, comes_wanted=True, goes_wanted=True)

    def _layer(self, kind: LayerShape, size: int) -> tuple[Part, ...]:
        """Layers that differ by their window alone share the MLP."""
        alike = replace(kind, window=None)
        if alike not in self._mlps:
            self._mlps[alike] = self._experts(kind, size) if kind.experts else self._mlp(size)
        return (*_attention(self.shape, self.rank, kind.window, self._gemm), self._mlps[alike])

    def _mlp(self, size: int) -> Part:
        """gate and up in one GEMM, the activation (reads both, writes one), down."""
        hidden = self.shape.hidden_size
        gemms = (self._gemm(2 * size, hidden), self._gemm(hidden, size))
        return Part("mlp", gemms, (), 3 * size * self.shape.dtype_bytes, kernels=3)

    def _experts(self, kind: LayerShape, size: int) -> Part:
        """Router, choice and sorting, two grouped GEMMs with the activation between, and the sum over top_k."""
        hidden, item = self.shape.hidden_size, self.shape.dtype_bytes
        gemms = (self._gemm(kind.experts, hidden), self._gemm(2 * size, hidden, kind), self._gemm(hidden, size, kind))
        moved = (3 * size * kind.top_k + (kind.top_k + 1) * hidden) * item + 2 * 4 * kind.experts
        return Part("mlp", gemms, (), moved, kernels=8)


def _attention(shape: ModelShape, rank: RankShape, window: int | None, gemm: Any) -> tuple[Part, ...]:
    """q, k, v in one GEMM, norms of q and k, rotation (q and k in and out), cache write (k and v in and out), attention
    (q in, the result out; keys and values count there), output. A norm over all heads is a request of its own."""
    head_bytes = shape.head_dim * shape.dtype_bytes
    qk = rank.heads + rank.kv_heads
    qkv = gemm(rank.qkv_heads * shape.head_dim, shape.hidden_size)
    out = gemm(shape.hidden_size, rank.heads * shape.head_dim)
    moved = (2 * qk + 4 * rank.kv_heads + 2 * rank.heads) * head_bytes
    if shape.qk_norm == "all":
        before = Part("qk_norm", (qkv,), (), qk * head_bytes, kernels=2, gather_bytes=8)
        return before, Part("attn", (), (out,), moved + 2 * qk * head_bytes, 5, window, attends=True)
    norms = 1 if shape.qk_norm else 0
    return (Part("attn", (qkv,), (out,), moved + norms * 2 * qk * head_bytes, 5 + norms, window, attends=True),)


def _dropping(layer: tuple[Part, ...]) -> tuple[Part, ...]:
    """The last layer: from its attention on, only the rows that make logits are alive."""
    *before, attention, mlp = layer
    return (*before, replace(attention, goes_wanted=True), replace(mlp, comes_wanted=True, goes_wanted=True))


def repeated(layers: Sequence[LayerShape]) -> list[tuple[tuple[LayerShape, ...], int]]:
    """Layers as (pattern, how many times), so that alike layers are laid out once: [(local, global), 13], say."""
    found, at = [], 0
    while at < len(layers):
        pattern, times = max(
            ((layers[at : at + size], _times(layers, at, size)) for size in range(1, LONGEST_PATTERN + 1)),
            key=lambda candidate: (
                (len(candidate[0]) * candidate[1], -len(candidate[0])) if candidate[1] > 1 else (1, 0)
            ),
        )
        if times == 1:
            pattern = pattern[:1]
        found.append((tuple(pattern), times))
        at += len(pattern) * times
    return found


def _times(layers: Sequence[LayerShape], at: int, size: int) -> int:
    """How often the `size` layers from `at` on stand there one after the other."""
    times = 1
    while layers[at : at + size] == layers[at + times * size : at + (times + 1) * size]:
        times += 1
    return times
