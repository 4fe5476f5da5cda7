"""Operators: what one kernel takes on so many SMs, while so large a share of the memory's bandwidth is taken."""

from __future__ import annotations

import math
from typing import NamedTuple

from tokenweave.cost.hardware import Hardware, Tile
from tokenweave.cost.shape import DTYPE_BYTES

SPLITS = (1, 2, 4, 8)  # of a GEMM's inner dimension, where the output alone has too few tiles
SHORTEST_SPLIT = 512  # of the inner dimension
QUERY_TILE = 128  # queries that one thread block of a flash attention kernel owns


class Gemm:
    """[rows, k] x [k, n]. With experts, `count` of them of which every row takes `top_k`: one grouped GEMM."""

    def __init__(self, n: int, k: int, hardware: Hardware, dtype: str, experts: int = 0, top_k: int = 1):
        self.n, self.k, self.experts, self.top_k = n, k, experts, top_k
        self.sms = hardware.sms
        self.item = DTYPE_BYTES[dtype]
        self.bandwidth = hardware.memory_bandwidth * hardware.efficiency.memory
        self.row_s = top_k * (n + k) * self.item / self.bandwidth
        self.weight_s = n * k * self.item / self.bandwidth
        grouped = hardware.efficiency.grouped_gemm if experts else 1.0
        self.flops = hardware.peak(dtype) * hardware.efficiency.gemm * grouped
        splits = [s for s in SPLITS if not experts and (s == 1 or k >= s * SHORTEST_SPLIT)]
        self.options = [self._option(tile, split) for tile in hardware.tiles for split in splits]
        self.grain = math.gcd(*(tile.rows for tile in hardware.tiles)) if hardware.tiles and not experts else 1
        self._chosen: dict[int, tuple[int, int, float, float]] = {}
        self._known: dict[tuple[int, int], float] = {}

    def _option(self, tile: Tile, split: int) -> tuple[int, int, float, float]:
        """(rows of a tile, tiles beside each other, seconds of a tile, seconds a row to add split sums in fp32)."""
        tile_s = 2 * tile.rows * tile.columns * self.k / split / (self.flops / self.sms * tile.efficiency)
        merge_s = 0.0 if split == 1 else 2 * split * self.n * 4 / self.bandwidth
        return tile.rows, split * math.ceil(self.n / tile.columns), tile_s, merge_s

    def seconds(self, rows: int, sms: int, taken: float = 0.0) -> float:
        """On `sms` SMs, while the share `taken` of the memory's bandwidth is used by others: the slower of the two."""
        if rows == 0:
            return 0.0
        compute_s, memory_s = self.compute_s(rows, sms), self.memory_s(rows) / (1.0 - taken)
        return compute_s if compute_s > memory_s else memory_s

    def compute_s(self, rows: int, sms: int) -> float:
        """Every SM does one tile a wave, and the last wave takes as long as the others.

        The library chooses the tile as if all SMs were free: beside a collective, it may be the wrong one.
        """
        key = (-(-rows // self.grain), sms)
        seconds = self._known.get(key)
        if seconds is None:
            seconds = self._known[key] = self._compute_s(key[0] * self.grain, sms)
        return seconds

    def _compute_s(self, rows: int, sms: int) -> float:
        if not self.options:
            return 2 * rows * self.top_k * self.n * self.k / (self.flops * sms / self.sms)
        if rows not in self._chosen:
            self._chosen[rows] = min(self.options, key=lambda option: self._waves_s(option, rows, self.sms))
        return self._waves_s(self._chosen[rows], rows, sms)

    def _waves_s(self, option: tuple[int, int, float, float], rows: int, sms: int) -> float:
        tile_rows, beside, tile_s, merge_s = option
        return -(-self._blocks(rows, tile_rows) * beside // sms) * tile_s + rows * merge_s

    def _blocks(self, rows: int, tile_rows: int) -> int:
        """Tiles below each other. Experts get unequal parts: each busy one wastes half a tile in the mean."""
        if not self.experts:
            return -(-rows // tile_rows)
        busy = self.busy_experts(rows)
        return math.ceil(max(busy, rows * self.top_k / tile_rows + busy / 2))

    def busy_experts(self, rows: int) -> float:
        """How many experts `rows` rows reach, if they choose at random."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** rows)

    def memory_s(self, rows: int) -> float:
        """Input, weights and output cross the memory bus once."""
        busy = self.busy_experts(rows) if self.experts else 1
        return rows * self.row_s + busy * self.weight_s


def visible_pairs(tokens: int, context: int, window: int | None) -> int:
    """(query, key) pairs of `tokens` queries after `context` keys, causal, at most `window` keys each."""
    return _pairs_before(context + tokens, window) - _pairs_before(context, window)


def _pairs_before(position: int, window: int | None) -> int:
    if window is None or position <= window:
        return position * (position + 1) // 2
    return window * (window + 1) // 2 + (position - window) * window


class AttentionTime(NamedTuple):
    """Seconds alone on the whole machine: of parts that compute bounds, of parts that memory bounds, and of the longest
    thread block, which bounds the first from below."""

    compute_s: float = 0.0
    memory_s: float = 0.0
    longest_s: float = 0.0

    def seconds(self, slowdown: float, taken: float) -> float:
        """slowdown: all SMs over those left; taken: the share of the memory's bandwidth that others use."""
        return max(self.compute_s * slowdown, self.longest_s) + self.memory_s / (1.0 - taken)


class Attention:
    """Flash attention over one rank's heads."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, window: int | None, hardware: Hardware, dtype: str):
        flops = hardware.peak(dtype) * hardware.efficiency.attention
        self.window = window
        self.pair_s = 4 * heads * head_dim / flops
        self.block_pair_s = 4 * head_dim / (flops / hardware.sms) if hardware.tiles else 0.0
        item = DTYPE_BYTES[dtype]
        self.key_s = 2 * kv_heads * head_dim * item / (hardware.memory_bandwidth * hardware.efficiency.memory)

    def chunk(self, tokens: int, context: int) -> AttentionTime:
        """Of `tokens` queries after `context` keys: the slower of computing and of reading keys and values."""
        if tokens == 0:
            return AttentionTime()
        keys = context + tokens if self.window is None else min(context + tokens, self.window + tokens - 1)
        pairs = keys if tokens == 1 else visible_pairs(tokens, context, self.window)
        compute_s, memory_s = pairs * self.pair_s, keys * self.key_s
        if memory_s > compute_s:
            return AttentionTime(0.0, memory_s)
        last_keys = keys if self.window is None else min(keys, self.window)
        return AttentionTime(compute_s, 0.0, min(tokens, QUERY_TILE) * last_keys * self.block_pair_s)
