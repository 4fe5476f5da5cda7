"""Sizes of the attention kernels: pure functions of shapes and of the GPU. Nothing is timed at run time."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_DOT = 16  # rows, keys and elements of a head that tl.dot takes
SPLIT_KEYS = 256  # keys that are worth a program of their own; a multiple of every tile's keys
MOST_SPLITS = 64  # what one program joins
PROGRAMS_PER_SM = 4  # that decode together on an SM: enough loads in flight for its share of the memory rate


@dataclass(frozen=True)
class Gpu:
    """What sizes depend on. capability: 90 for compute capability 9.0."""

    sms: int
    capability: int


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time: rows, each a query and a head, by keys.

    stages: Triton's num_stages. The keys' addresses are loaded as well, so keys and values are loaded ahead by one tile
    at 3 stages and by two at 5. Chosen so that no registers are spilled and 100 KB of shared memory do.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def prefill_tile(head_dim: int, element_bytes: int, group: int, gpu: Gpu) -> Tile:
    """For `group` query heads of one KV head."""
    row_bytes = power_of_two(head_dim) * element_bytes
    if element_bytes == 4:  # without tensor cores: a thread holds whole rows
        tile = Tile(32, 32 if row_bytes <= 256 else 16, 8, 3)
    elif row_bytes <= 128:
        tile = Tile(128, 32 if gpu.capability >= 100 else 64, 8, 3)
    elif row_bytes <= 256:
        # wgmma reads the queries anew for each block of keys: fewer than 64 starve it.
        tile = Tile(128, 64, 8, 3) if gpu.capability >= 90 else Tile(128, 32, 8, 5)
    else:
        tile = Tile(64, 32, 8, 3)
    return Tile(max(tile.rows, power_of_two(group)), tile.keys, tile.warps, tile.stages)


def decode_tile(head_dim: int, element_bytes: int, group: int) -> Tile:
    """As prefill_tile; the rows are the heads of one KV head: at most 8 KB of keys at a time, as of values."""
    keys = 8192 // (power_of_two(head_dim) * element_bytes)
    return Tile(max(power_of_two(group), LEAST_DOT), min(max(keys, LEAST_DOT), 32), 4, 5)


def splits_of(sms: int, spans: int, kv_heads: int, most_keys: int) -> int:
    """How many programs share a sequence's keys: a power of two that fills the SMs, where there are keys for it."""
    fill = -(-PROGRAMS_PER_SM * sms // (spans * kv_heads))
    worth = -(-most_keys // SPLIT_KEYS)
    return power_of_two(min(fill, worth, MOST_SPLITS))


def padded_dim(head_dim: int) -> int:
    """Elements of a head as the kernels hold it."""
    return max(power_of_two(head_dim), LEAST_DOT)


def power_of_two(count: int) -> int:
    """The least one that is not smaller."""
    return 1 << (count - 1).bit_length()
