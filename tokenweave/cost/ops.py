"""Operators: what one kernel takes on so many SMs, while so large a share of the memory's bandwidth is taken."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tokenweave.cost.hardware import Hardware, Tile
from tokenweave.cost.shape import DTYPE_BYTES

Numbers: TypeAlias = Any  # one number, or an array of them: what follows holds for both

SPLITS = (1, 2, 4, 8)  # of a GEMM's inner dimension, where the output alone has too few tiles
SHORTEST_SPLIT = 512  # of the inner dimension
QUERY_TILE = 128  # queries that one thread block of a flash attention kernel owns
FEW_ROWS = 4096  # beyond so many every expert is busy
LEAST_TABLE = 64  # entries


class Gemm:
    """[rows, k] x [k, n]. With experts, `count` of them of which every row takes `top_k`: one grouped GEMM.

    Rows and SMs may be arrays. Where there are tiles, `reach` has to be told first how many rows will be asked for.
    """

    def __init__(self, n: int, k: int, hardware: Hardware, dtype: str, experts: int = 0, top_k: int = 1):
        self.n, self.k, self.experts, self.top_k = n, k, experts, top_k
        self.sms = hardware.sms
        self.item = DTYPE_BYTES[dtype]
        self.bandwidth = hardware.memory_bandwidth * hardware.efficiency.memory
        self.row_s = top_k * (n + k) * self.item / self.bandwidth
        self.weight_s = n * k * self.item / self.bandwidth
        grouped = hardware.efficiency.grouped_gemm if experts else 1.0
        self.flops = hardware.peak(dtype) * hardware.efficiency.gemm * grouped
        splits = [s for s in SPLITS if s == 1 or (not experts and k >= s * SHORTEST_SPLIT)]
        self.options = [self._option(tile, split) for tile in hardware.tiles for split in splits]
        self.grain = math.gcd(*(tile.rows for tile in hardware.tiles)) if hardware.tiles and not experts else 1
        self._table = np.empty((3, 0))  # tiles, seconds of one, seconds to add split sums; by rows / grain, rounded up

    def _option(self, tile: Tile, split: int) -> tuple[int, int, float, float]:
        """(rows of a tile, tiles beside each other, seconds of a tile, seconds a row to add split sums in fp32)."""
        tile_s = 2 * tile.rows * tile.columns * self.k / split / (self.flops / self.sms * tile.efficiency)
        merge_s = 0.0 if split == 1 else 2 * split * self.n * 4 / self.bandwidth
        return tile.rows, split * math.ceil(self.n / tile.columns), tile_s, merge_s

    def reach(self, rows: int) -> None:
        """Be ready for up to `rows` rows."""
        entries = -(-rows // self.grain) + 1
        if self.options and entries > self._table.shape[1]:
            entries = max(LEAST_TABLE, 1 << (entries - 1).bit_length())
            self._table = self._tilings(np.arange(entries) * self.grain)

    def seconds(self, rows: Numbers, sms: Numbers, crowding: Numbers = 1.0) -> Numbers:
        """Of at least one row, on `sms` SMs, while others make the memory slower by a factor: computing or moving."""
        return np.maximum(self.compute_s(rows, sms), self.memory_s(rows) * crowding)

    def compute_s(self, rows: Numbers, sms: Numbers) -> Numbers:
        """Every SM does one tile a wave, and the last wave takes as long as the others.

        The library chooses the tile as if all SMs were free: beside a collective, it may be the wrong one. Told how
        many are left (Plan.carve_out), it may choose a better one than this.
        """
        if not self.options:
            return 2 * rows * self.top_k * self.n * self.k / (self.flops * sms / self.sms)
        tiles, tile_s, merge_s = self._table.take((rows + (self.grain - 1)) // self.grain, axis=1)
        return np.ceil(tiles / sms) * tile_s + merge_s

    def memory_s(self, rows: Numbers) -> Numbers:
        """Input, weights and output cross the memory bus once."""
        return rows * self.row_s + (self.busy_experts(rows) * self.weight_s if self.experts else self.weight_s)

    def busy_experts(self, rows: Numbers) -> Numbers:
        """How many experts `rows` rows reach, if they choose at random."""
        return self._busy[np.minimum(rows, FEW_ROWS)]

    @functools.cached_property
    def _busy(self) -> np.ndarray:
        idle = 1 - self.top_k / self.experts
        return np.array([self.experts * (1 - idle**rows) for rows in range(FEW_ROWS + 1)])

    def _tilings(self, rows: np.ndarray) -> np.ndarray:
        """The table's columns for row counts, with the tile that is fastest on all SMs."""
        best, best_s = np.zeros((3, len(rows))), np.full(len(rows), np.inf)
        for tile_rows, beside, tile_s, row_merge_s in self.options:
            tiles, merge_s = self._blocks(rows, tile_rows) * float(beside), rows * row_merge_s
            seconds = np.ceil(tiles / self.sms) * tile_s + merge_s
            better = seconds < best_s
            best_s[better] = seconds[better]
            best[:, better] = tiles[better], np.full(better.sum(), tile_s), merge_s[better]
        return best

    def _blocks(self, rows: np.ndarray, tile_rows: int) -> np.ndarray:
        """Tiles below each other. Experts get unequal parts: each busy one wastes half a tile in the mean."""
        if not self.experts:
            return -(-rows // tile_rows)
        busy = self.busy_experts(rows)
        return np.ceil(np.maximum(busy, rows * self.top_k / tile_rows + busy / 2))


def visible_pairs(tokens: Numbers, context: Numbers, window: int | None) -> Numbers:
    """(query, key) pairs of `tokens` queries after `context` keys, causal, at most `window` keys each."""
    return _pairs_before(context + tokens, window) - _pairs_before(context, window)


def _pairs_before(position: Numbers, window: int | None) -> Numbers:
    """Of all queries before a position: a triangle, and beyond the window a strip."""
    if window is None:
        return position * (position + 1) // 2
    inside = np.minimum(position, window)
    return inside * (inside + 1) // 2 + (position - inside) * window


class AttentionTime(NamedTuple):
    """Seconds alone on the whole machine: of parts that compute bounds, of parts that memory bounds, and of the longest
    thread block, which bounds the first from below."""

    compute_s: Numbers = 0.0
    memory_s: Numbers = 0.0
    longest_s: Numbers = 0.0

    def seconds(self, slowdown: Numbers = 1.0, crowding: Numbers = 1.0) -> Numbers:
        """slowdown: all SMs over those left; crowding: what others make the memory slower by."""
        return np.maximum(self.compute_s * slowdown, self.longest_s) + self.memory_s * crowding


class Attention:
    """Flash attention over one rank's heads."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, window: int | None, hardware: Hardware, dtype: str):
        flops = hardware.peak(dtype) * hardware.efficiency.attention
        self.window = window
        self.pair_s = 4 * heads * head_dim / flops
        self.block_pair_s = 4 * head_dim / (flops / hardware.sms) if hardware.tiles else 0.0
        item = DTYPE_BYTES[dtype]
        self.key_s = 2 * kv_heads * head_dim * item / (hardware.memory_bandwidth * hardware.efficiency.memory)

    def chunk(self, tokens: Numbers, context: Numbers) -> AttentionTime:
        """Of `tokens` queries after `context` keys: the slower of computing and of reading keys and values."""
        keys = (context + tokens) * np.minimum(tokens, 1)  # no query, no key
        last_keys = keys
        if self.window is not None:
            keys, last_keys = np.minimum(keys, self.window + tokens - 1), np.minimum(keys, self.window)
        compute_s, memory_s = visible_pairs(tokens, context, self.window) * self.pair_s, keys * self.key_s
        computes = compute_s >= memory_s
        longest_s = np.minimum(tokens, QUERY_TILE) * last_keys * self.block_pair_s
        return AttentionTime(compute_s * computes, memory_s * ~computes, longest_s * computes)
