"""Tables against what a span says of itself, and their padding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.kv_cache import allocate_storage
from tokenweave.engine.tables import Capacity, capacity_of, padded_starts, tables_of
from tokenweave.models.attention import PagedAttention

LAYERS, BLOCK_SIZE = 3, 4


def span(count: int, context: int, *blocks: int, wanted: int = 0) -> Span:
    return Span((0,) * count, context, blocks, context + count, wanted)


SPANS = (span(5, 0, 7, 2, 9), span(1, 8, 3, 4, 1, wanted=1), span(3, 6, 5, 8, 6, wanted=2))
EXACT = Capacity(tokens=9, rows=3, spans=3, blocks=3, shortest=1, longest=5, most_wanted=2)


def made(capacity: Capacity = EXACT, spans=SPANS):
    return tables_of(Batch(tuple(spans)), capacity, LAYERS, BLOCK_SIZE)


def test_what_spans_need():
    assert capacity_of(Batch(SPANS), BLOCK_SIZE) == EXACT
    assert capacity_of(Batch(SPANS[:1]), BLOCK_SIZE) == Capacity(5, 0, 1, 2, shortest=5, longest=5, most_wanted=1)


def test_exact_tables():
    tables = made()
    assert tables.query_starts.tolist() == [0, 5, 6, 9]
    assert tables.tail_starts.tolist() == [0, 0, 1, 3]
    assert tables.kv_lengths.tolist() == [5, 9, 9]
    assert tables.block_tables.tolist() == [[7, 2, 0], [3, 4, 1], [5, 8, 6]]  # not block 9, which is not begun
    assert tables.slots.dtype == np.int64
    ints = (tables.query_starts, tables.tail_starts, tables.kv_lengths, tables.block_tables)
    assert all(array.dtype == np.int32 for array in ints)


def test_slots_are_rows_of_the_cache():
    storage = allocate_storage(10, LAYERS, BLOCK_SIZE, 1, 1, torch.float32, torch.device("cpu")).zero_()
    storage.view(-1)[torch.from_numpy(made().slots)] = torch.arange(1.0, 10)
    found = [storage[block, 0, 0, at].item() for block, at in [(7, 0), (7, 3), (2, 0), (1, 0), (8, 2), (8, 3), (6, 0)]]
    assert found == [1, 4, 5, 6, 7, 8, 9]
    paged = PagedAttention(SPANS, storage)
    assert made().slots.tolist() == paged._written.tolist()


def test_a_table_that_is_too_short_is_refused():
    """Zeros in its place would be another sequence's block."""
    with pytest.raises(ValueError, match="need more blocks of 4 than its table has"):
        made(spans=(*SPANS[:2], span(3, 6, 5, 8, wanted=2)))


def test_padding_belongs_to_spans_without_keys():
    tables = made(replace(EXACT, tokens=15, rows=4, spans=6, blocks=5))
    assert tables.query_starts.tolist() == [0, 5, 6, 9, 10, 11, 15]
    assert tables.tail_starts.tolist() == [0, 0, 1, 3, 4, 4, 4]
    assert tables.kv_lengths.tolist() == [5, 9, 9, 0, 0, 0]
    assert tables.slots.tolist()[9:] == [-1] * 6
    assert tables.block_tables.shape == (6, 5)
    assert not tables.block_tables[3:].any()
    assert not tables.block_tables[:, 3:].any()


def test_padded_decoding_has_a_token_for_each_span():
    spans = [span(1, 3, 2, wanted=1), span(1, 0, 1, wanted=1)]
    tables = made(Capacity(8, 8, 8, 1, shortest=1, longest=1), spans)
    assert tables.query_starts.tolist() == tables.tail_starts.tolist() == list(range(9))


@pytest.mark.parametrize(
    ("lengths", "spans", "total", "starts"),
    [([2], 1, 2, [0, 2]), ([2], 3, 2, [0, 2, 2, 2]), ([2], 3, 3, [0, 2, 3, 3]), ([2], 3, 9, [0, 2, 3, 9])],
)
def test_padded_starts(lengths, spans, total, starts):
    assert padded_starts(lengths, spans, total).tolist() == starts


@pytest.mark.parametrize(
    "room",
    [
        {"tokens": 8},
        {"rows": 2},
        {"spans": 2},
        {"blocks": 2},
        {"longest": 4},
        {"most_wanted": 1},
        {"shortest": 2},
        {"tokens": 10},  # no span for the padding
        {"rows": 4},
        {"tokens": 15, "spans": 4},  # one for six tokens, and none may have more than five
        {"rows": 6, "spans": 4},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(room):
    with pytest.raises(ValueError, match=r"^Capacity\(.*\) does not fit into Capacity\(.*\)"):
        made(replace(EXACT, **room))


def test_a_token_of_padding_needs_the_kernel_for_spans_of_one():
    spans = SPANS[:1]
    made(Capacity(5, 0, 2, 2, shortest=2, longest=8), spans)
    with pytest.raises(ValueError, match="does not fit"):
        made(Capacity(6, 0, 2, 2, shortest=2, longest=8), spans)
