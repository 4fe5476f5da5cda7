"""Prefill: spans of several queries after any context, a tile of queries and of the heads of one KV head at a time."""

import triton
import triton.language as tl

from tokenweave.kernels.attention_keys import attend_keys


@triton.jit
def span_of(tile, starts, spans, QUERIES: tl.constexpr):
    """The span that a tile is in, where span s has the tiles from starts[s] // QUERIES + s on.

    Each span gets room for its part-filled tile so; nothing but the queries' places need be known to find it.
    """
    low = 0
    high = spans
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(starts + middle) // QUERIES + middle <= tile
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit(do_not_specialize=["spans", "stride_table"])
def prefill(
    q,  # [queries, heads, DIM], strided
    out,  # [queries, heads, DIM], contiguous
    keys,  # [blocks, BLOCK_SIZE, kv_heads, DIM], strided
    values,  # the same, with the same strides
    starts,  # int32 [spans + 1]
    kv_lengths,  # int32 [spans]
    block_tables,  # int32 [spans, most blocks]
    scale,
    softcap,
    spans,
    stride_query,
    stride_query_head,
    stride_block,
    stride_token,
    stride_head,
    stride_table,
    GROUP: tl.constexpr,  # query heads of one KV head
    QUERIES: tl.constexpr,  # of a tile: QUERIES * GROUP <= ROWS
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SKIP_SINGLE: tl.constexpr,  # spans of one query are left to the decode kernel
):
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the latest queries see most keys: they begin first
    span = span_of(tile, starts, spans, QUERIES)
    start = tl.load(starts + span)
    count = tl.load(starts + span + 1) - start
    at = (tile - start // QUERIES - span) * QUERIES
    if at >= count:
        return
    if SKIP_SINGLE:  # noqa: SIM102  # one is known when compiled, the other not
        if count == 1:
            return
    length = tl.load(kv_lengths + span)
    earliest = length - count + at  # the position of the tile's first query
    latest = tl.minimum(length, earliest + QUERIES) - 1

    row = tl.arange(0, ROWS)
    query = at + row // GROUP
    head = kv_head * GROUP + row % GROUP
    column = tl.arange(0, DIM_PADDED)
    alive = ((row // GROUP < QUERIES) & (query < count))[:, None] & (column < DIM)[None, :]
    place = (start + query).to(tl.int64) * stride_query + head * stride_query_head
    tile_q = tl.load(q + place[:, None] + column[None, :], mask=alive, other=0.0)
    position = length - count + query

    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    keys += kv_head * stride_head
    values += kv_head * stride_head
    table = block_tables + span.to(tl.int64) * stride_table
    # Keys that some of the tile's queries see and others do not are at the window's edge, and at the diagonal.
    first = 0
    inner = 0
    if WINDOW > 0:
        first = tl.maximum(earliest - WINDOW + 1, 0) // KEYS * KEYS
        inner = tl.maximum((tl.maximum(latest - WINDOW + 1, 0) + KEYS - 1) // KEYS * KEYS, first)
        acc, total, best = attend_keys(
            tile_q, acc, total, best, position, first, tl.minimum(inner, latest + 1), keys, values, table, scale,
            softcap, stride_block, stride_token, BLOCK_SIZE, DIM, DIM_PADDED, KEYS, WINDOW, CAPPED, True,
        )  # fmt: skip
    diagonal = tl.maximum((earliest + 1) // KEYS * KEYS, inner)
    acc, total, best = attend_keys(
        tile_q, acc, total, best, position, inner, diagonal, keys, values, table, scale,
        softcap, stride_block, stride_token, BLOCK_SIZE, DIM, DIM_PADDED, KEYS, WINDOW, CAPPED, False,
    )  # fmt: skip
    acc, total, best = attend_keys(
        tile_q, acc, total, best, position, diagonal, latest + 1, keys, values, table, scale,
        softcap, stride_block, stride_token, BLOCK_SIZE, DIM, DIM_PADDED, KEYS, WINDOW, CAPPED, True,
    )  # fmt: skip
    attended = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = tl.num_programs(0) * GROUP
    place = ((start + query).to(tl.int64) * heads + head) * DIM
    tl.store(out + place[:, None] + column[None, :], attended.to(out.dtype.element_ty), mask=alive)
