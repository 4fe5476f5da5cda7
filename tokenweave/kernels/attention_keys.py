"""The loop that all attention kernels share: a tile of queries against a range of keys in a paged cache."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Exact at both ends: exp overflows to infinity above and to 0 below."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def attend_keys(
    q,  # [ROWS, DIM_PADDED]
    acc,  # fp32 [ROWS, DIM_PADDED]: weighted values so far, relative to 2 ** best
    total,  # fp32 [ROWS]: of the weights so far
    best,  # fp32 [ROWS]: the highest score so far, times log2(e)
    position,  # int32 [ROWS]: the last key that a row sees
    first,  # keys first to last, in steps of KEYS
    last,
    keys,  # of block 0 of this layer and KV head
    values,
    table,  # int32: the sequence's blocks
    scale,
    softcap,
    stride_block,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a row sees; 0: all up to `position`
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees every key of the range, and KEYS divides it
):
    """One block of keys after the other: (acc, total, best) of a softmax whose maximum is not known beforehand.

    scores = cap(q @ k.T * scale); scores[not visible] = -inf
    acc, total = exp(scores) @ v, exp(scores).sum(1)        # both relative to exp(highest score so far)

    Where no key is visible, none is read: what lies there may be NaN.
    """
    column = tl.arange(0, DIM_PADDED)
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        if MASKED:
            there = key < last
            block = tl.load(table + key // BLOCK_SIZE, mask=there, other=0)
            read = there[:, None] & (column < DIM)[None, :]
        else:
            block = tl.load(table + key // BLOCK_SIZE)
            read = (column < DIM)[None, :]
        place = block.to(tl.int64) * stride_block + (key % BLOCK_SIZE) * stride_token
        k = tl.load(keys + place[:, None] + column[None, :], mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAPPED:
            scores = softcap * tanh(scores * (scale / softcap)) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        if MASKED:
            visible = there[None, :] & (key[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        shift = higher
        if MASKED:
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(best - shift)
        v = tl.load(values + place[:, None] + column[None, :], mask=read, other=0.0)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        best = higher
    return acc, total, best
