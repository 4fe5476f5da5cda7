"""Buckets: every batch fits the one it gets, and few buckets serve all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.buckets import Bounds, bucket_of, decode_rows, prefill_tokens, snapped, why_eager
from tokenweave.engine.inputs import padded_inputs_of
from tokenweave.engine.tables import tables_of
from tokenweave.weave.plan import Plan

BLOCK_SIZE, BLOCKS = 4, 32
BOUNDS = Bounds(decode_rows=20, prefill_tokens=300, blocks=BLOCKS, block_size=BLOCK_SIZE)


@st.composite
def spans(draw, longest: int):
    count = draw(st.integers(1, longest))
    context = draw(st.integers(0, BLOCKS * BLOCK_SIZE - count))
    table = tuple(range(-(-(context + count) // BLOCK_SIZE)))
    return Span((1,) * count, context, table, context + count, draw(st.integers(0, 1)))


@st.composite
def planned(draw):
    """A batch and a plan, one half or two."""
    longest = draw(st.sampled_from([1, 1, 5, 60]))
    batch = Batch(tuple(draw(st.lists(spans(longest), min_size=1, max_size=20 if longest == 1 else 9))))
    woven = batch.rows > 1 and draw(st.booleans())
    return batch, Plan(batch.rows, draw(st.integers(1, batch.rows - 1)) if woven else None, "sharded")


@given(planned())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_every_batch_fits_its_bucket(case):
    batch, plan = case
    if why_eager(batch, BOUNDS):
        return
    bucket = bucket_of(batch, plan, BOUNDS)
    parts = bucket.split(batch)
    assert len(parts) == len(plan.bounds)
    assert all(part.rows for part in parts)
    assert sum(part.rows for part in parts) == batch.rows
    for part, room in zip(parts, bucket.halves, strict=True):
        inputs = padded_inputs_of(part, tables_of(part, room, 2, BLOCK_SIZE))
        assert len(inputs.token_ids) == room.tokens
        assert len(inputs.logits_rows) == room.rows >= len(part.wanted_rows())
    assert sum(room.tokens for room in bucket.halves) <= max(BOUNDS.decode_rows, BOUNDS.prefill_tokens)
    assert all(room.tokens == part.rows for part, room in zip(parts[:-1], bucket.halves, strict=False)), (
        "padding is last"
    )


@given(planned())
@settings(deadline=None, derandomize=True)
def test_a_bucket_says_all_that_its_shapes_depend_on(case):
    """A batch that fills the bucket gets the same one."""
    batch, plan = case
    if why_eager(batch, BOUNDS) or not batch.decodes:
        return
    bucket = bucket_of(batch, plan, BOUNDS)
    size = sum(room.tokens for room in bucket.halves)
    full = Batch((*batch.spans, *(batch.spans[-1:] * (size - batch.rows))))
    cut = bucket.starts[1] if len(bucket.starts) > 1 else None
    assert bucket_of(full, Plan(size, cut, "sharded"), BOUNDS) == bucket


def test_sizes():
    assert [decode_rows(rows, 20) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 20)] == [1, 2, 4, 8, 8, 16, 16, 20, 20]
    assert [prefill_tokens(n, 2000) for n in (1, 17, 129, 1024, 1025, 1999)] == [16, 32, 256, 1024, 1280, 2000]
    sizes = {prefill_tokens(n, 4096) for n in range(1, 4097)}
    assert len(sizes) == 8 + 7 + 12


@pytest.mark.parametrize(("cut", "rows", "expected"), [(3, 5, 3), (9, 17, 8), (19, 37, 16), (15, 16, 8), (1, 300, 64), (1024, 2048, 1024), (1984, 2000, 1984)])  # fmt: skip  # noqa: E501
def test_cuts(cut, rows, expected):
    assert snapped(cut, rows) == expected


def test_few_cuts_of_halves():
    """Cut in the middle, as without a cost model: one graph per bucket of eight rows, or of 64."""
    assert len({snapped((rows + 1) // 2, rows) for rows in range(17, 65)}) <= 4
    assert len({snapped((rows + 1) // 2, rows) for rows in range(897, 1025)}) <= 2


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (Batch((Span((1,), 3, (0,), 3, 1),) * 21), "21 rows that decode, and at most 20 are captured"),
        (Batch((Span((1,) * 301, 0, tuple(range(76)), 301, 1),)), "301 tokens, and at most 300 are captured"),
        (Batch((Span((1, 2), 0, (0,), 2, 2),)), "a sequence wants logits of several rows"),
    ],
)
def test_what_is_not_captured(batch, reason):
    assert why_eager(batch, BOUNDS) == reason
