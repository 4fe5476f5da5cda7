"""How large the tiles of attention are, and how many programs share a sequence."""

from __future__ import annotations

import pytest

from tokenweave.kernels.attention_sizes import SPLIT_KEYS, Gpu, decode_tile, power_of_two, prefill_tile, splits_of


@pytest.mark.parametrize("group", [1, 3, 8, 12, 64, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 256])
def test_tiles_hold_the_heads_and_divide_a_split(head_dim, element_bytes, group):
    tiles = [prefill_tile(head_dim, element_bytes, group, Gpu(132, capability)) for capability in (80, 90, 100)]
    for tile in [*tiles, decode_tile(head_dim, element_bytes, group)]:
        assert tile.rows >= max(16, group)
        assert tile.keys >= 16
        assert SPLIT_KEYS % tile.keys == 0
        assert power_of_two(tile.rows) == tile.rows


@pytest.mark.parametrize(
    ("spans", "kv_heads", "most_keys", "expected"),
    [
        (1, 8, 131072, 64),  # 8 heads alone would keep 8 of 132 SMs busy
        (1, 1, 131072, 64),  # no more than one program can join
        (64, 8, 4096, 2),
        (128, 8, 4096, 1),
        (1, 8, 256, 1),  # a program has keys enough
        (1, 8, 600, 4),
    ],
)
def test_splits(spans, kv_heads, most_keys, expected):
    assert splits_of(132, spans, kv_heads, most_keys) == expected


def test_powers_of_two():
    assert [power_of_two(count) for count in (1, 2, 3, 96, 128)] == [1, 2, 4, 128, 128]
