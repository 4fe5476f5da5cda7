"""Tables: what attention on a device needs to know of a half, as a few arrays of integers that are uploaded at once.

Their shapes follow from a `Capacity` alone, and so do the grids of the kernels that read them: a captured graph is
right for any contents. What a half does not fill is padding.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import gt
from typing import Generic, TypeVar

import numpy as np

from tokenweave.engine.batch import INT32, Batch

Array = TypeVar("Array")  # np.ndarray on the host, torch.Tensor on the device


@dataclass(frozen=True)
class Capacity:
    """What tables have room for. Host integers: fixed when a graph is captured."""

    tokens: int
    rows: int  # that make logits
    spans: int
    blocks: int  # of one block table
    shortest: int = 1  # fewest tokens a span may have; 1: kernels for decoding are launched
    longest: int = 2  # most tokens a span may have; above 1: kernels for prefill are launched
    most_wanted: int = 1  # most rows that make logits a span may have


@dataclass(frozen=True)
class Tables(Generic[Array]):
    """Where a half's tokens lie in the cache, and which queries see which keys.

    Span s has queries query_starts[s] to query_starts[s + 1]; the last of them sees kv_lengths[s] keys, each one before
    it one key less. Where only the rows that make logits attend, their tail_starts take the place of query_starts.
    A padding span has 0 keys; its queries, if any, are padding tokens, and what they attend to is zeros.
    """

    capacity: Capacity
    slots: Array  # int64 [tokens]: row of layer 0's key, as `PagedAttention` counts rows; -1: padding, not written
    query_starts: Array  # int32 [spans + 1]
    tail_starts: Array  # int32 [spans + 1]
    kv_lengths: Array  # int32 [spans]: keys visible after this step
    block_tables: Array  # int32 [spans, blocks]

    @property
    def arrays(self) -> list[Array]:
        return [self.slots, self.query_starts, self.tail_starts, self.kv_lengths, self.block_tables]


def capacity_of(batch: Batch, block_size: int) -> Capacity:
    """What exactly this batch needs."""
    lengths, blocks = batch.lengths, -(-max(batch.ends) // block_size)
    counts = (batch.rows, sum(batch.wanted), len(lengths), blocks)
    return Capacity(*counts, min(lengths), max(lengths), max(1, max(batch.wanted)))


def tables_of(batch: Batch, capacity: Capacity, num_layers: int, block_size: int) -> Tables[np.ndarray]:
    """The tables of a batch, padded to `capacity`.

    Padding tokens belong to padding spans: one each, and what is left to the last. ValueError: they do not fit.
    """
    check_room(capacity_of(batch, block_size), capacity)
    kv_lengths = np.zeros(capacity.spans, np.int32)
    kv_lengths[: len(batch.ends)] = batch.ends
    block_tables = block_tables_of(batch, capacity, block_size)
    position = batch.positions
    block = block_tables[batch.owners, position // block_size].astype(np.int64)
    slots = np.full(capacity.tokens, -1, np.int64)
    slots[: batch.rows] = block * (2 * num_layers * block_size) + position % block_size
    query_starts = padded_starts(batch.lengths, capacity.spans, capacity.tokens)
    tail_starts = padded_starts(batch.wanted, capacity.spans, capacity.rows)
    return Tables(capacity, slots, query_starts, tail_starts, kv_lengths, block_tables)


def block_tables_of(batch: Batch, capacity: Capacity, block_size: int) -> np.ndarray:
    """int32 [spans, blocks] of `capacity`: of each span's table the blocks that hold its keys, then zeros.

    ValueError: a table has fewer blocks than its keys need.
    """
    used_bytes = [4 * -(-end // block_size) for end in batch.ends]
    whole = [array(INT32, span.block_table).tobytes() for span in batch.spans]
    if any(map(gt, used_bytes, map(len, whole))):
        raise ValueError(f"a sequence's keys need more blocks of {block_size} than its table has; this is a bug")
    width = 4 * capacity.blocks
    rows = [table[:used].ljust(width, b"\0") for table, used in zip(whole, used_bytes, strict=True)]
    packed = bytearray(b"".join(rows).ljust(capacity.spans * width, b"\0"))
    return np.frombuffer(packed, np.int32).reshape(capacity.spans, capacity.blocks)


def padded_starts(lengths: Sequence[int], spans: int, total: int) -> np.ndarray:
    """int32 [spans + 1]: where each span starts and the last one ends, padding spans included."""
    left, padding = total - sum(lengths), spans - len(lengths)
    single = min(left, max(padding - 1, 0))
    padded = [*lengths, *([1] * single), *([0] * (padding - 1 - single)), *([left - single] if padding else [])]
    return np.array([0, *accumulate(padded)], np.int32)


def check_room(needed: Capacity, capacity: Capacity) -> None:
    """ValueError, where what is needed does not fit, or padding tokens would have no span to belong to."""
    room = ("tokens", "rows", "spans", "blocks", "longest", "most_wanted")
    fits = all(getattr(needed, name) <= getattr(capacity, name) for name in room)
    spare = capacity.spans - needed.spans
    tokens, rows = capacity.tokens - needed.tokens, capacity.rows - needed.rows
    padded = tokens <= spare * capacity.longest and rows <= spare * capacity.most_wanted
    shortest = min(needed.shortest, 1 if tokens else needed.shortest)
    if not (fits and padded and shortest >= capacity.shortest):
        raise ValueError(f"{needed} does not fit into {capacity}, with spans to spare for padding tokens")
