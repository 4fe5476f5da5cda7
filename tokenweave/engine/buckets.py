"""Buckets: which steps one captured graph serves. Pure functions of the step that rank 0 has told everyone."""

from __future__ import annotations

from dataclasses import dataclass

from tokenweave.engine.batch import Batch
from tokenweave.engine.tables import Capacity
from tokenweave.weave.plan import Plan

GRAPH_TOKENS = 1024  # of the largest prefill that is captured, on a GPU that nothing is known of
DECODE_STEP = 8  # rows; below it buckets double
PREFILL_STEPS = ((128, 16), (1024, 128), (4096, 256))  # up to so many tokens, buckets are so far apart
LARGE_STEP = 1024
LEAST_BLOCKS = 16  # of a sequence's table
CUT_STEPS = ((256, 64), (16, 8))  # from so many rows on, a cut is a multiple of


@dataclass(frozen=True)
class Bounds:
    """The largest steps that are captured. blocks: of one sequence."""

    decode_rows: int
    prefill_tokens: int
    blocks: int
    block_size: int


@dataclass(frozen=True)
class Bucket:
    """All host integers that queueing a step depends on: a graph is right for every step of its bucket."""

    form: str  # of the sum, as in Plan
    attention_sms: int
    mlp_sms: int
    carved_sms: int
    halves: tuple[Capacity, ...]
    starts: tuple[int, ...]  # of each half among the step's rows; padding comes last

    @property
    def sms(self) -> dict[str, int]:
        return {"attn": self.attention_sms, "mlp": self.mlp_sms}

    def split(self, batch: Batch) -> list[Batch]:
        """The halves of a batch of this bucket."""
        if len(self.starts) == 1:
            return [batch]
        stops = (*self.starts[1:], batch.rows)
        return [batch.narrow(start, stop) for start, stop in zip(self.starts, stops, strict=True)]


def why_eager(batch: Batch, bounds: Bounds) -> str | None:
    """Why this batch is not captured; None: it is."""
    if batch.decodes:
        most, what = bounds.decode_rows, "rows that decode"
    else:
        most, what = bounds.prefill_tokens, "tokens"
    if batch.rows > most:
        return f"{batch.rows} {what}, and at most {most} are captured"
    if max(batch.wanted) > 1:
        return "a sequence wants logits of several rows"
    return None


def bucket_of(batch: Batch, plan: Plan, bounds: Bounds) -> Bucket:
    """The bucket of a batch that is captured. Its last half is padded to the bucket's size."""
    decode = batch.decodes
    size = decode_rows(batch.rows, bounds.decode_rows) if decode else prefill_tokens(batch.rows, bounds.prefill_tokens)
    starts = (0,) if plan.cut is None else (0, snapped(plan.cut, batch.rows))
    stops = (*starts[1:], size)
    needed = -(-max(batch.ends) // bounds.block_size)
    blocks = min(max(LEAST_BLOCKS, power_of_two(needed)), bounds.blocks)
    halves = tuple(
        decode_capacity(stop - start, blocks)
        if decode
        else prefill_capacity(stop - start, len(batch.narrow(start, min(stop, batch.rows)).spans), blocks)
        for start, stop in zip(starts, stops, strict=True)
    )
    return Bucket(plan.form, plan.attention_sms, plan.mlp_sms, plan.carved_sms, halves, starts)


def decode_capacity(rows: int, blocks: int) -> Capacity:
    """A span for each row; padding spans have one token, too."""
    return Capacity(rows, rows, rows, blocks, shortest=1, longest=1, most_wanted=1)


def prefill_capacity(tokens: int, spans: int, blocks: int) -> Capacity:
    """Spans of any length, and at least one more for the padding."""
    room = power_of_two(spans + 1)
    return Capacity(tokens, room, room, blocks, shortest=1, longest=tokens, most_wanted=room)


def decode_rows(rows: int, most: int) -> int:
    """1, 2, 4, 8, 16, 24, ... and `most`: the least that is no less than `rows`."""
    size = power_of_two(rows) if rows <= DECODE_STEP else rounded_up(rows, DECODE_STEP)
    return min(size, most)


def prefill_tokens(tokens: int, most: int) -> int:
    """16, 32, ... 128, 256, ... 1024, 1280, ... and `most`. Padding is computed: at most a quarter from 64 on."""
    step = next((step for upper, step in PREFILL_STEPS if tokens <= upper), LARGE_STEP)
    return min(rounded_up(tokens, step), most)


def snapped(cut: int, rows: int) -> int:
    """The cut, rounded so that few cuts are told apart. The planner's, at tiles of a GEMM, stay where they are."""
    step = next((step for least, step in CUT_STEPS if rows >= least), 1)
    return min(max(step, (cut + step // 2) // step * step), (rows - 1) // step * step)


def power_of_two(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()


def rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
