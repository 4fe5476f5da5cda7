"""Chunk: in steps of how many tokens a long prompt is computed fastest."""

from __future__ import annotations

from collections.abc import Sequence

from tokenweave.cost.cost import Cost
from tokenweave.cost.step import Step
from tokenweave.cost.tuned import TunedStep, scaled
from tokenweave.cost.work import Batch, Chunk

SLACK = 1.02  # a smaller chunk may cost so much: decoding sequences then wait less for each step
PROMPT_CHUNKS = 2  # the prompt is so many of the largest chunk


def best_chunk(cost: Cost, steps: Sequence[TunedStep]) -> int:
    """Of the tuned row counts, the smallest within SLACK of the fastest."""
    prompt_tokens = PROMPT_CHUNKS * max(step.rows for step in steps)
    seconds = {step.rows: prompt_s(cost, step, prompt_tokens) for step in steps}
    return min(rows for rows in seconds if seconds[rows] <= SLACK * min(seconds.values()))


def prompt_s(cost: Cost, tuned: TunedStep, prompt_tokens: int) -> float:
    """A prompt in chunks of `tuned.rows` tokens: as measured, and with the context before each chunk as predicted."""
    starts = range(0, prompt_tokens, tuned.rows)
    chunks = [Chunk(min(tuned.rows, prompt_tokens - start), start) for start in starts]
    predicted = [Step(cost, Batch([c])).seconds(scaled(tuned.choice, tuned.rows, c.tokens)) for c in chunks]
    return sum(predicted) * tuned.seconds / predicted[0]
