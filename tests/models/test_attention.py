"""Attention over the paged cache against the plain maths on each sequence by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.texts import LAYERS, OPTIONS, PLAIN, Texts
from tokenweave.models.attention import QUERIES, Options

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
@pytest.mark.parametrize("cut", [None, 4, 8, 9])
def test_rows_that_make_logits_alone(options, cut):
    texts = Texts([9, 14, 3, 4], block_size=3)
    texts.step([5, 2, 2, 0], options)
    texts.check([1, 11, 1, 4], options, cut, wanted=[1, 1, 1, 0])
    texts.check([3, 1, 0, 0], options, None if cut is None else 2, wanted=[2, 1, 0, 0])


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
    texts = Texts([QUERIES + 40], block_size=64, heads=2)
    texts.check([QUERIES + 7], options)
    texts.check([33], options)


@pytest.mark.parametrize("window", [None, 1, 100, QUERIES, 2 * QUERIES + 50])
@pytest.mark.parametrize("context", [0, 5, QUERIES])
def test_more_queries_than_are_computed_at_a_time(window, context):
    texts = Texts([context + 2 * QUERIES + 9], block_size=64, heads=2)
    if context:
        texts.step([context], Options(0.35, window))
    texts.check([2 * QUERIES + 7], Options(0.35, window))


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
