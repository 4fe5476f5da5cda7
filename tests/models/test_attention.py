"""Attention over the paged cache against the plain maths on each sequence by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.kv_cache import allocate_storage
from tokenweave.models.attention import CAPPED_QUERIES, Options, PagedAttention

LAYERS = 2
HEAD_DIM = 8


@dataclass
class Texts:
    """Sequences with random queries, keys and values, and a cache of NaN into which batches of them are written."""

    lengths: list[int]
    block_size: int = 4
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.float32
    seed: int = 0
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        counts = [-(-length // self.block_size) for length in self.lengths]
        free = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        self.tables = [tuple(free.pop() for _ in range(count)) for count in counts]
        self.storage = allocate_storage(
            sum(counts) + 3, LAYERS, self.block_size, self.kv_heads, HEAD_DIM, self.dtype, torch.device("cpu")
        ).fill_(float("nan"))

        def draw(heads: int) -> list[torch.Tensor]:
            shape = (LAYERS, max(self.lengths), heads, HEAD_DIM)
            return [torch.randn(*shape, generator=generator).to(self.dtype) for _ in self.lengths]

        self.q, self.k, self.v = draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)
        self.done = [0] * len(self.lengths)

    def step(self, counts: list[int], options: Options, cut: int | None = None) -> list[torch.Tensor]:
        """The next `counts` tokens of every sequence, in halves if there is a cut; attended rows of layers 0, 1."""
        spans = [
            Span((0,) * count, self.done[i], self.tables[i], self.lengths[i]) for i, count in enumerate(counts) if count
        ]
        batch = Batch(tuple(spans))
        halves = [batch] if cut is None else [batch.narrow(0, cut), batch.narrow(cut, batch.rows)]
        bounds = [(0, batch.rows)] if cut is None else [(0, cut), (cut, batch.rows)]
        paged = [PagedAttention(half.spans, self.storage) for half in halves]
        attended = []
        for layer in range(
            LAYERS
        ):  # layer by layer, as the weave does: the second half reads what the first has written
            rows = [self.rows(of, counts, layer) for of in (self.q, self.k, self.v)]
            parts = [
                one(layer, *(x[start:stop] for x in rows), options)
                for one, (start, stop) in zip(paged, bounds, strict=True)
            ]
            attended.append(torch.cat(parts))
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]
        return attended

    def rows(self, of: list[torch.Tensor], counts: list[int], layer: int) -> torch.Tensor:
        return torch.cat([of[i][layer, self.done[i] : self.done[i] + count] for i, count in enumerate(counts)])

    def expected(self, counts: list[int], options: Options) -> list[torch.Tensor]:
        """What the next step must give."""
        return [
            torch.cat(
                [self.plain(layer, i, self.done[i], self.done[i] + count, options) for i, count in enumerate(counts)]
            )
            for layer in range(LAYERS)
        ]

    def plain(self, layer: int, i: int, start: int, stop: int, options: Options) -> torch.Tensor:
        """Rows start..stop of sequence i: the formula, in fp64, one head and one query at a time."""
        q, k, v = (of[i][layer].double() for of in (self.q, self.k, self.v))
        out = torch.empty(stop - start, self.heads, HEAD_DIM, dtype=torch.float64)
        for at in range(start, stop):
            first = 0 if options.window is None else max(0, at - options.window + 1)
            for head in range(self.heads):
                shared = head * self.kv_heads // self.heads
                scores = k[first : at + 1, shared] @ q[at, head] * options.scale
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                out[at - start, head] = scores.softmax(0) @ v[first : at + 1, shared]
        return out.flatten(1)

    def check(self, counts: list[int], options: Options, cut: int | None = None) -> None:
        expected = self.expected(counts, options)
        for got, plain in zip(self.step(counts, options, cut), expected, strict=True):
            assert got.dtype == self.dtype
            tolerance = 2e-5 if self.dtype == torch.float32 else 0.03
            torch.testing.assert_close(got.double(), plain, rtol=0, atol=tolerance)


PLAIN = Options(scale=0.35)
OPTIONS = {
    "plain": PLAIN,
    "window": Options(0.35, window=5),
    "window of one": Options(0.35, window=1),
    "wide window": Options(0.35, window=1000),
    "soft cap": Options(0.35, softcap=1.5),
    "window and soft cap": Options(0.35, window=6, softcap=1.5),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@each_option
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (1, 1)])
def test_prompts_then_decoding(options, block_size, heads, kv_heads):
    texts = Texts([11, 1, 23, 4, 6], block_size, heads, kv_heads)
    texts.check([9, 1, 20, 2, 3], options)
    texts.check([1, 0, 1, 1, 1], options)
    texts.check([1, 0, 1, 1, 1], options)


@each_option
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_prompts_in_chunks(options, block_size):
    texts = Texts([30, 13], block_size)
    for counts in ([7, 1], [1, 5], [16, 7], [6, 0]):
        texts.check(counts, options)


@each_option
def test_prompts_beside_sequences_that_decode(options):
    texts = Texts([9, 8, 20, 5])
    texts.check([8, 3, 0, 4], options)
    texts.check([1, 4, 15, 1], options)
    texts.check([0, 1, 5, 0], options)


@each_option
@pytest.mark.parametrize("cut", range(1, 13))
def test_any_cut_into_halves(options, cut):
    """Through the middle of a sequence too: the second half's queries see the first half's keys."""
    texts = Texts([6, 14, 3], block_size=3)
    texts.check([5, 2, 2], options)
    texts.check([1, 11, 1], options, cut)


@each_option
def test_decoding_groups_of_very_different_lengths(options):
    """Short contexts are attended together with short ones, long with long ones."""
    lengths = [2, 3, 64, 65, 66, 127, 128, 130, 260, 300]
    texts = Texts(lengths, block_size=16)
    texts.step([length - 1 for length in lengths], options)
    texts.check([1] * len(lengths), options)


@pytest.mark.parametrize("window", [None, 300])
def test_soft_cap_of_more_queries_than_are_computed_at_a_time(window):
    options = Options(0.35, window, softcap=1.5)
    texts = Texts([CAPPED_QUERIES + 40], block_size=64, heads=2)
    texts.check([CAPPED_QUERIES + 7], options)
    texts.check([33], options)


def test_bfloat16():
    texts = Texts([40, 9], dtype=torch.bfloat16)
    texts.check([38, 8], PLAIN)
    texts.check([1, 1], PLAIN)


def test_a_soft_cap_that_is_far_away_changes_nothing():
    far, none = Texts([20, 9]), Texts([20, 9])
    for counts in ([17, 8], [1, 1], [2, 0]):
        for capped, plain in zip(far.step(counts, Options(0.35, softcap=1e4)), none.step(counts, PLAIN), strict=True):
            torch.testing.assert_close(capped, plain, rtol=0, atol=1e-5)


def test_blocks_that_others_share_are_read_and_not_written():
    """Two sequences with the same first block: the second computes only what is its own."""
    texts = Texts([8, 8], block_size=4)
    texts.tables[1] = (texts.tables[0][0], texts.tables[1][1])
    for of in (texts.q, texts.k, texts.v):
        of[1][:, :4] = of[0][:, :4]
    texts.check([8, 0], PLAIN)
    texts.done[1] = 4
    before = texts.storage[texts.tables[0][0]].clone()
    texts.check([0, 4], PLAIN)
    assert torch.equal(texts.storage[texts.tables[0][0]], before)


def test_only_places_of_new_tokens_are_written():
    texts = Texts([10, 3], block_size=4)
    texts.step([6, 2], PLAIN)
    written = ~texts.storage.isnan().flatten(4).all(-1)  # [block, layer, 2, token]
    for table, length in zip(texts.tables, (6, 2), strict=True):
        for at in range(length):
            assert written[table[at // 4], :, :, at % 4].all()
    assert written.sum() == (6 + 2) * LAYERS * 2


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_steps(data):
    """Lengths, chunks, cuts, blocks, heads and options at random."""
    kv_heads = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    texts = Texts(lengths, data.draw(st.integers(1, 6)), kv_heads * data.draw(st.integers(1, 3)), kv_heads)
    window = data.draw(st.none() | st.integers(1, 30))
    options = Options(data.draw(st.sampled_from([0.1, 1.0])), window, data.draw(st.sampled_from([None, 2.0])))
    while texts.done != lengths:
        counts = [data.draw(st.integers(0, length - done)) for length, done in zip(lengths, texts.done, strict=True)]
        rows = sum(counts)
        if rows:
            texts.check(counts, options, data.draw(st.none() | st.integers(1, rows - 1)) if rows > 1 else None)
        elif not data.draw(st.booleans()):
            break
