"""Sequences whose attention is known: steps of them through any attention, against the plain maths on each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tokenweave.engine.attention import HalfAttention
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.kv_cache import allocate_storage
from tokenweave.models.attention import Options, PagedAttention
from tokenweave.weave.request import Rows

LAYERS = 2
TOLERANCE = {torch.float32: 2e-5, torch.float16: 0.004, torch.bfloat16: 0.03}

Attend = Callable[[Sequence[Span], torch.Tensor], HalfAttention]  # of spans, over a cache


@dataclass
class Texts:
    """Sequences with random queries, keys and values, and a cache of NaN into which batches of them are written."""

    lengths: list[int]
    block_size: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    attend: Attend = PagedAttention
    seed: int = 0
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        counts = [-(-length // self.block_size) for length in self.lengths]
        free = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        self.tables = [tuple(free.pop() for _ in range(count)) for count in counts]
        shape = (sum(counts) + 3, LAYERS, self.block_size, self.kv_heads, self.head_dim)
        self.storage = allocate_storage(*shape, self.dtype, torch.device(self.device)).fill_(float("nan"))

        def draw(heads: int) -> list[torch.Tensor]:
            shape = (LAYERS, max(self.lengths), heads, self.head_dim)
            return [torch.randn(*shape, generator=generator).to(self.device, self.dtype) for _ in self.lengths]

        self.q, self.k, self.v = draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)
        self.done = [0] * len(self.lengths)

    def step(
        self, counts: list[int], options: Options, cut: int | None = None, wanted: list[int] | None = None
    ) -> list[torch.Tensor]:
        """The next `counts` tokens of every sequence, in halves if there is a cut; attended rows of layers 0, 1.

        wanted: of the last layer, only as many of each sequence's last rows.
        """
        batch = Batch(self.spans(counts, wanted or [0] * len(counts)))
        bounds = [(0, batch.rows)] if cut is None else [(0, cut), (cut, batch.rows)]
        halves = [batch.narrow(*bound) for bound in bounds]
        attentions = [self.attend(half.spans, self.storage) for half in halves]
        attended = []
        # Layer by layer, as the weave does: the second half reads what the first has written.
        for layer in range(LAYERS):
            q, k, v = (self.rows(of, counts, layer) for of in (self.q, self.k, self.v))
            parts = []
            for attention, half, bound in zip(attentions, halves, bounds, strict=True):
                alive = half.wanted_rows() if wanted and layer == LAYERS - 1 else None
                rows = None if alive is None else Rows(alive, torch.tensor(alive, dtype=torch.long, device=q.device))
                qk = torch.cat((q, k), dim=1)[slice(*bound)]
                parts.append(attention(layer, qk, v[slice(*bound)], no_rotation(qk), options, rows))
            attended.append(torch.cat(parts))
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]
        return attended

    def spans(self, counts: list[int], wanted: list[int]) -> tuple[Span, ...]:
        return tuple(
            Span((0,) * count, self.done[i], self.tables[i], self.lengths[i], wanted[i])
            for i, count in enumerate(counts)
            if count
        )

    def rows(self, of: list[torch.Tensor], counts: list[int], layer: int) -> torch.Tensor:
        return torch.cat([of[i][layer, self.done[i] : self.done[i] + count] for i, count in enumerate(counts)])

    def expected(self, counts: list[int], options: Options, wanted: list[int] | None = None) -> list[torch.Tensor]:
        """What the next step must give."""
        stops = [done + count for done, count in zip(self.done, counts, strict=True)]
        fewer = self.done if wanted is None else [stop - few for stop, few in zip(stops, wanted, strict=True)]
        starts = [*[self.done] * (LAYERS - 1), fewer]
        return [
            torch.cat([self.plain(layer, i, starts[layer][i], stop, options) for i, stop in enumerate(stops)])
            for layer in range(LAYERS)
        ]

    def plain(self, layer: int, i: int, start: int, stop: int, options: Options) -> torch.Tensor:
        """Rows start..stop of sequence i: the formula, in fp64, one head and one query at a time."""
        q, k, v = (of[i][layer].cpu().double() for of in (self.q, self.k, self.v))
        out = torch.empty(stop - start, self.heads, self.head_dim, dtype=torch.float64)
        for at in range(start, stop):
            first = 0 if options.window is None else max(0, at - options.window + 1)
            for head in range(self.heads):
                shared = head * self.kv_heads // self.heads
                scores = k[first : at + 1, shared] @ q[at, head] * options.scale
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                out[at - start, head] = scores.softmax(0) @ v[first : at + 1, shared]
        return out.flatten(1)

    def check(
        self, counts: list[int], options: Options, cut: int | None = None, wanted: list[int] | None = None
    ) -> None:
        expected = self.expected(counts, options, wanted)
        for got, plain in zip(self.step(counts, options, cut, wanted), expected, strict=True):
            assert got.dtype == self.dtype
            torch.testing.assert_close(got.cpu().double(), plain, rtol=0, atol=TOLERANCE[self.dtype])


def no_rotation(qk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of position 0: rotation has tests of its own."""
    one = torch.ones(len(qk), 1, qk.shape[2], device=qk.device)
    return one, torch.zeros_like(one)


PLAIN = Options(scale=0.35)
OPTIONS = {
    "plain": PLAIN,
    "window": Options(0.35, window=5),
    "window of one": Options(0.35, window=1),
    "wide window": Options(0.35, window=1000),
    "soft cap": Options(0.35, softcap=1.5),
    "window and soft cap": Options(0.35, window=6, softcap=1.5),
}
