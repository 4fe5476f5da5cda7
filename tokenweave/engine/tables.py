"""Tables: what attention on a device needs to know of a half, as a few arrays of integers that are uploaded at once.

Their shapes follow from a `Capacity` alone, and so do the grids of the kernels that read them: a captured graph is
right for any contents. What a half does not fill is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np

from tokenweave.models.attention import Span

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


def capacity_of(spans: Sequence[Span], block_size: int) -> Capacity:
    """What exactly these spans need."""
    lengths = [len(span) for span in spans]
    keys = max(span.context + len(span) for span in spans)
    wanted = [span.wanted for span in spans]
    blocks = -(-keys // block_size)
    return Capacity(sum(lengths), sum(wanted), len(spans), blocks, min(lengths), max(lengths), max(1, *wanted))


def tables_of(spans: Sequence[Span], capacity: Capacity, num_layers: int, block_size: int) -> Tables[np.ndarray]:
    """The tables of these spans, one after the other, padded to `capacity`.

    Padding tokens belong to padding spans: one each, and what is left to the last. ValueError: they do not fit.
    """
    check_room(spans, capacity, block_size)
    kv_lengths = np.zeros(capacity.spans, np.int32)
    block_tables = np.zeros((capacity.spans, capacity.blocks), np.int32)
    slots = np.full(capacity.tokens, -1, np.int64)
    at = 0
    for i, span in enumerate(spans):
        kv_lengths[i] = span.context + len(span)
        used = -(-int(kv_lengths[i]) // block_size)
        block_tables[i, :used] = span.block_table[:used]
        position = np.arange(span.context, kv_lengths[i])
        block = block_tables[i, position // block_size].astype(np.int64)
        slots[at : at + len(span)] = block * (2 * num_layers * block_size) + position % block_size
        at += len(span)
    query_starts = padded_starts([len(span) for span in spans], capacity.spans, capacity.tokens)
    tail_starts = padded_starts([span.wanted for span in spans], capacity.spans, capacity.rows)
    return Tables(capacity, slots, query_starts, tail_starts, kv_lengths, block_tables)


def padded_starts(lengths: Sequence[int], spans: int, total: int) -> np.ndarray:
    """int32 [spans + 1]: where each span starts and the last one ends, padding spans included."""
    left, padding = total - sum(lengths), spans - len(lengths)
    single = min(left, max(padding - 1, 0))
    padded = [*lengths, *([1] * single), *([0] * (padding - 1 - single)), *([left - single] if padding else [])]
    return np.array([0, *accumulate(padded)], np.int32)


def check_room(spans: Sequence[Span], capacity: Capacity, block_size: int) -> None:
    """ValueError, where these spans do not fit, or padding tokens would have no span to belong to."""
    needed = capacity_of(spans, block_size)
    room = ("tokens", "rows", "spans", "blocks", "longest", "most_wanted")
    fits = all(getattr(needed, name) <= getattr(capacity, name) for name in room)
    spare = capacity.spans - needed.spans
    tokens, rows = capacity.tokens - needed.tokens, capacity.rows - needed.rows
    padded = tokens <= spare * capacity.longest and rows <= spare * capacity.most_wanted
    shortest = min(needed.shortest, 1 if tokens else needed.shortest)
    if not (fits and padded and shortest >= capacity.shortest):
        raise ValueError(f"{needed} does not fit into {capacity}, with spans to spare for padding tokens")
