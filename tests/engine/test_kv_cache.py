"""The block pool by itself. tests/engine/test_scheduler.py holds it against a model of what every block contains."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.engine.kv_cache import BlockPool, allocate_storage, block_digests

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def digests(tokens, block_size=2, salt=0):
    return block_digests(tokens, block_size, salt, [])


def filled(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks taken and published for the full blocks of `tokens`, still in use."""
    blocks = pool.take(len(tokens) // pool.block_size)
    for block, digest in zip(blocks, digests(tokens, pool.block_size), strict=True):
        pool.publish(block, digest)
    return blocks


# -- digests -----------------------------------------------------------------------------------------------------------


@given(tokens=TOKENS, other=TOKENS, block_size=st.integers(1, 4), salt=st.integers(0, 1), other_salt=st.integers(0, 1))
@settings(deadline=None, derandomize=True)
def test_digests_are_equal_exactly_where_everything_up_to_there_is(tokens, other, block_size, salt, other_salt):
    ours, theirs = digests(tokens, block_size, salt), digests(other, block_size, other_salt)
    assert len(ours) == len(tokens) // block_size
    for i, (mine, yours) in enumerate(zip(ours, theirs, strict=False), start=1):
        same = salt == other_salt and tokens[: i * block_size] == other[: i * block_size]
        assert (mine == yours) == same


@given(tokens=TOKENS, at=st.integers(0, 12), block_size=st.integers(1, 4))
@settings(deadline=None, derandomize=True)
def test_known_digests_are_extended(tokens, at, block_size):
    known = digests(tokens[:at], block_size)
    assert block_digests(tokens, block_size, 0, known) == digests(tokens, block_size)


def test_token_ids_do_not_run_together():
    assert digests([1, 23], 2) != digests([12, 3], 2)
    assert digests([1, 0, 0], 1)[:1] != digests([256], 1)


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_published_blocks_are_matched_as_far_as_they_go():
    pool = BlockPool(8, 2, caching=True)
    blocks = filled(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match(digests([1, 2, 3, 4, 5, 6])) == blocks
    assert pool.match(digests([1, 2, 3, 4, 9, 9])) == blocks[:2]
    assert pool.match(digests([9, 9, 3, 4, 5, 6])) == []


def test_without_caching_nothing_is_matched():
    pool = BlockPool(8, 2, caching=False)
    filled(pool, [1, 2, 3, 4])
    assert pool.match(digests([1, 2, 3, 4])) == []


def test_released_blocks_are_matched_until_they_are_handed_out():
    pool = BlockPool(4, 2, caching=True)
    tokens = [1, 2, 3, 4, 5, 6]
    blocks = filled(pool, tokens)
    pool.release(blocks)
    assert pool.match(digests(tokens)) == blocks
    pool.take(2)  # the one that was never used, then the last of the released
    assert pool.match(digests(tokens)) == blocks[:2]
    pool.take(2)
    assert pool.match(digests(tokens)) == []


def test_the_least_recently_used_goes_first():
    pool = BlockPool(4, 2, caching=True)
    old, new = filled(pool, [1, 1]), filled(pool, [2, 2])
    pool.release(new)
    pool.release(old)
    pool.take(2)
    pool.take(1)
    assert pool.match(digests([2, 2])) == []
    assert pool.match(digests([1, 1])) == old


def test_what_is_used_again_is_not_handed_out():
    pool = BlockPool(3, 2, caching=True)
    blocks = filled(pool, [1, 2])
    pool.release(blocks)
    pool.reuse(blocks)
    assert pool.num_free == 2
    assert blocks[0] not in pool.take(2)


def test_a_shared_block_is_free_when_its_last_user_is_gone():
    pool = BlockPool(2, 2, caching=True)
    blocks = filled(pool, [1, 2])
    pool.reuse(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2


def test_cost_counts_cached_blocks_that_would_have_to_be_taken_from_the_free_ones():
    pool = BlockPool(4, 2, caching=True)
    used, free = filled(pool, [1, 2]), filled(pool, [3, 4])
    pool.release(free)
    assert pool.cost([], 2) == 2
    assert pool.cost(used, 2) == 2
    assert pool.cost(free, 2) == 3


def test_the_first_block_of_a_digest_keeps_it():
    pool = BlockPool(4, 2, caching=True)
    first, second = filled(pool, [1, 2]), filled(pool, [1, 2])
    assert pool.match(digests([1, 2])) == first
    pool.release(second)
    pool.take(3)  # the second among them
    assert pool.match(digests([1, 2])) == first


def test_nothing_is_taken_that_is_not_there():
    pool = BlockPool(2, 2, caching=True)
    pool.take(2)
    with pytest.raises(KeyError):
        pool.take(1)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for(tokens, blocks):
    assert BlockPool(1, 4, True).blocks_for(tokens) == blocks


def test_storage_is_block_major():
    storage = allocate_storage(5, 3, 4, 2, 8, torch.bfloat16, torch.device("cpu"))
    assert storage.shape == (5, 3, 2, 4, 2, 8)
    assert storage.dtype == torch.bfloat16
    assert storage[1].is_contiguous()  # a block of all layers is one piece
