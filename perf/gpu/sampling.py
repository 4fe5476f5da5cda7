"""Sampling: what it takes to draw a step's tokens, by what requests ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from perf.gpu.clock import in_turn
from perf.gpu.figure import Figure, spread
from perf.gpu.scale import Scale
from tokenweave.engine.sampler import History, SamplingRow, sample

CALLS = 20  # in a round
RANDOM = SamplingRow(temperature=0.8)
KINDS = {
    "greedy": SamplingRow(),
    "temperature": RANDOM,
    "top_p": replace(RANDOM, top_p=0.9),
    "top_k, top_p and min_p": replace(RANDOM, top_k=50, top_p=0.9, min_p=0.01),
    "top_p and penalties": replace(RANDOM, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1),
}


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    vocabulary = scale.shape["vocab_size"]
    for size in scale.batches:
        logits = 3 * torch.randn(size, vocabulary, device=scale.torch_device)
        runs = {name: partial(repeat, logits, rows_of(row, size)) for name, row in KINDS.items()}
        for name, seconds in in_turn(runs, scale.torch_device, scale.rounds).items():
            what = f"sampling, {size} rows of {vocabulary}, {name}"
            say(spread(what, [1e6 * s / CALLS for s in seconds], "us", note="host and device, whichever takes longer"))


def rows_of(row: SamplingRow, size: int) -> list[SamplingRow]:
    """As in a step that decodes: of a history one token is new."""
    told = [History(i, 0, (i,)) if row.penalised else None for i in range(size)]
    return [replace(row, key=i, position=i, history=history) for i, history in enumerate(told)]


def repeat(logits: Tensor, rows: list[SamplingRow]) -> None:
    for _ in range(CALLS):
        sample(logits, rows)
