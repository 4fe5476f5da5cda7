"""Batches and cuts through them: whatever the cut, the parts are the whole."""

from __future__ import annotations

import pickle
from array import array
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.engine.batch import INT32, Batch, Span
from tokenweave.engine.half import Half
from tokenweave.engine.inputs import inputs_of
from tokenweave.engine.packing import upload

BLOCK_SIZE = 4


@st.composite
def spans(draw):
    count, context = draw(st.integers(1, 6)), draw(st.integers(0, 9))
    tokens = draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
    blocks = draw(st.lists(st.integers(0, 50), min_size=-(-(context + count) // BLOCK_SIZE), max_size=20))
    return Span(tuple(tokens), context, tuple(blocks), draw(st.integers(0, 20)), draw(st.integers(0, count)))


BATCHES = st.lists(spans(), min_size=1, max_size=5).map(lambda listed: Batch(tuple(listed)))


def rows(batch: Batch) -> list[tuple]:
    """Every row as (token, position, block table, prompt length, makes logits)."""
    flat = [
        (token, span.context + i, span.block_table, span.prompt_len)
        for span in batch.spans
        for i, token in enumerate(span.tokens)
    ]
    wanted = batch.wanted_rows()
    assert list(wanted) == sorted(set(wanted))
    return [(*row, i in wanted) for i, row in enumerate(flat)]


@given(batch=BATCHES, data=st.data())
@settings(deadline=None, derandomize=True)
def test_any_range_of_rows(batch, data):
    start = data.draw(st.integers(0, batch.rows))
    stop = data.draw(st.integers(start, batch.rows))
    part = batch.narrow(start, stop)
    assert part.rows == stop - start
    assert rows(part) == rows(batch)[start:stop]
    assert all(len(span) and 0 <= span.wanted <= len(span) for span in part.spans)


@given(batch=BATCHES, data=st.data())
@settings(deadline=None, derandomize=True)
def test_any_cuts_give_back_the_whole(batch, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, batch.rows), max_size=3)))
    bounds = zip([0, *cuts], [*cuts, batch.rows], strict=True)
    assert [row for bound in bounds for row in rows(batch.narrow(*bound))] == rows(batch)


@given(batch=BATCHES, data=st.data())
@settings(deadline=None, derandomize=True)
def test_a_cut_of_a_cut(batch, data):
    stop = data.draw(st.integers(0, batch.rows))
    start = data.draw(st.integers(0, stop))
    inner = data.draw(st.integers(0, stop - start))
    assert batch.narrow(start, stop).narrow(inner, stop - start) == batch.narrow(start + inner, stop)


@given(batch=BATCHES, data=st.data())
@settings(deadline=None, derandomize=True)
def test_as_others_get_it(batch, data):
    rows_and_places = st.tuples(st.integers(0, batch.rows - 1), st.integers(0, 9))
    batch = replace(batch, late=tuple(data.draw(st.lists(rows_and_places, max_size=3))))
    spans = tuple(replace(span, block_table=array(INT32, span.block_table)) for span in batch.spans)
    assert pickle.loads(pickle.dumps(batch)) == replace(batch, spans=spans)


def test_nothing_as_others_get_it():
    assert pickle.loads(pickle.dumps(Batch(()))) == Batch(())


@given(batch=BATCHES)
@settings(deadline=None, derandomize=True)
def test_columns(batch):
    assert batch.positions.tolist() == [position for span in batch.spans for position in range(span.context, end(span))]
    assert batch.ends == list(map(end, batch.spans))
    assert batch.rows == sum(batch.lengths) == sum(map(len, batch.spans))
    assert batch.decodes == all(len(span) == span.wanted == 1 for span in batch.spans)


def end(span: Span) -> int:
    return span.context + len(span)


def test_a_cut_through_the_middle_of_a_span():
    span = Span((10, 11, 12, 13, 14), 3, (7, 8), prompt_len=8, wanted=2)
    first, second = (Batch((span,)).narrow(*bound).spans for bound in ((0, 4), (4, 5)))
    assert first == (Span((10, 11, 12, 13), 3, (7, 8), prompt_len=8, wanted=1),)
    assert second == (Span((14,), 7, (7, 8), prompt_len=8, wanted=1),)


@pytest.mark.parametrize(("wanted", "expected"), [(0, (0, 0)), (1, (0, 1)), (2, (0, 2)), (3, (1, 2)), (5, (3, 2))])
def test_which_half_makes_the_logits(wanted, expected):
    batch = Batch((Span((1, 2, 3, 4, 5), 0, (0, 1), 5, wanted),))
    assert tuple(len(batch.narrow(*bound).wanted_rows()) for bound in ((0, 3), (3, 5))) == expected


def test_whole_spans_stay_as_they_are():
    one, two = Span((1, 2), 0, (0,), 2), Span((3,), 9, (1, 2, 3), 4, 1)
    batch = Batch((one, two))
    assert batch.narrow(0, 3) == batch
    assert batch.narrow(0, 2).spans == (one,)
    assert batch.narrow(2, 3).spans == (two,)
    assert batch.narrow(1, 1) == Batch(())


@given(batch=BATCHES)
@settings(deadline=None, derandomize=True)
def test_a_half_as_tensors(batch):
    (inputs,) = upload([inputs_of(batch, None)], torch.device("cpu"))
    half = Half(batch, inputs, attention=None, channel=None)
    expected = rows(batch)
    assert half.token_ids.dtype == half.positions.dtype == torch.long
    assert half.token_ids.tolist() == [token for token, *_ in expected]
    assert half.positions.tolist() == [position for _, position, *_ in expected]
    assert half.rope_lengths == [max(prompt_len, position + 1) for _, position, _, prompt_len, _ in expected]
    assert (
        list(half.logits_rows.host)
        == half.logits_rows.index.tolist()
        == [i for i, row in enumerate(expected) if row[4]]
    )
