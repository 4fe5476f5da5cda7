"""Decode: spans of one query. A sequence's keys are split over several programs, and their parts joined by `join`."""

import triton
import triton.language as tl

from tokenweave.kernels.attention_keys import attend_keys


@triton.jit
def keys_of_split(count, splits, KEYS: tl.constexpr, LEAST: tl.constexpr):
    """Keys of each split but the last that has any: whole blocks of KEYS, and at least LEAST, a multiple of them."""
    even = tl.cdiv(count, splits)
    return tl.maximum(tl.cdiv(even, KEYS) * KEYS, LEAST)


@triton.jit(do_not_specialize=["stride_table"])
def decode(
    q,  # [queries, heads, DIM], strided
    out,  # [queries, heads, DIM], contiguous; written if there is one split
    parts,  # fp32 [splits, spans, heads, DIM]; written if there are several
    sums,  # fp32 [splits, spans, heads]: log2 of each part's sum of exp2
    keys,  # [blocks, BLOCK_SIZE, kv_heads, DIM], strided
    values,  # the same, with the same strides
    starts,  # int32 [spans + 1]
    kv_lengths,  # int32 [spans]
    block_tables,  # int32 [spans, most blocks]
    scale,
    softcap,
    stride_query,
    stride_query_head,
    stride_block,
    stride_token,
    stride_head,
    stride_table,
    GROUP: tl.constexpr,  # query heads of one KV head
    ROWS: tl.constexpr,  # GROUP, padded
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLIT: tl.constexpr,  # there are several splits; how many, the grid alone says, since it varies between steps
    LEAST: tl.constexpr,
):
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    kv_head = tl.program_id(1)
    span = tl.program_id(2)
    start = tl.load(starts + span)
    if tl.load(starts + span + 1) - start != 1:
        return
    length = tl.load(kv_lengths + span)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    share = keys_of_split(length - first, splits, KEYS, LEAST)
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    if SPLIT:  # noqa: SIM102  # one is known when compiled, the other not
        if begin >= end:
            return

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    column = tl.arange(0, DIM_PADDED)
    alive = (row < GROUP)[:, None] & (column < DIM)[None, :]
    place = start.to(tl.int64) * stride_query + head * stride_query_head
    tile_q = tl.load(q + place[:, None] + column[None, :], mask=alive, other=0.0)
    position = tl.full([ROWS], 0, tl.int32) + length

    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    keys += kv_head * stride_head
    values += kv_head * stride_head
    table = block_tables + span.to(tl.int64) * stride_table
    whole = begin + tl.maximum(end - begin, 0) // KEYS * KEYS
    acc, total, best = attend_keys(
        tile_q, acc, total, best, position, begin, whole, keys, values, table, scale,
        softcap, stride_block, stride_token, BLOCK_SIZE, DIM, DIM_PADDED, KEYS, 0, CAPPED, False,
    )  # fmt: skip
    acc, total, best = attend_keys(
        tile_q, acc, total, best, position, whole, end, keys, values, table, scale,
        softcap, stride_block, stride_token, BLOCK_SIZE, DIM, DIM_PADDED, KEYS, 0, CAPPED, True,
    )  # fmt: skip
    attended = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = tl.num_programs(1) * GROUP
    if SPLIT:
        part = (split.to(tl.int64) * tl.num_programs(2) + span) * heads + head
        tl.store(parts + part[:, None] * DIM + column[None, :], attended, mask=alive)
        tl.store(sums + part, best + tl.log2(total), mask=row < GROUP)
    else:
        place = (start.to(tl.int64) * heads + head) * DIM
        tl.store(out + place[:, None] + column[None, :], attended.to(out.dtype.element_ty), mask=alive)


@triton.jit(do_not_specialize=["splits"])
def join(
    out,  # [queries, heads, DIM], contiguous
    parts,  # fp32 [splits, spans, heads, DIM]
    sums,  # fp32 [splits, spans, heads]
    starts,  # int32 [spans + 1]
    kv_lengths,  # int32 [spans]
    splits,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """out = sum over splits of part * exp2(sum) / sum over splits of exp2(sum); zeros where there are no keys."""
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    span = tl.program_id(1)
    start = tl.load(starts + span)
    if tl.load(starts + span + 1) - start != 1:
        return
    count = tl.load(kv_lengths + span)
    if WINDOW > 0:
        count = tl.minimum(count, WINDOW)
    share = keys_of_split(count, splits, KEYS, LEAST)
    split = tl.arange(0, MOST_SPLITS)
    written = split * share < count
    column = tl.arange(0, DIM_PADDED)
    part = (split.to(tl.int64) * tl.num_programs(1) + span) * heads + head
    logs = tl.load(sums + part, mask=written, other=float("-inf"))
    best = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(weights, 0)
    read = written[:, None] & (column < DIM)[None, :]
    values = tl.load(parts + part[:, None] * DIM + column[None, :], mask=read, other=0.0)
    attended = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    place = (start.to(tl.int64) * heads + head) * DIM
    tl.store(out + place + column, attended.to(out.dtype.element_ty), mask=column < DIM)
