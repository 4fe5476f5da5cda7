"""Steps of every kind on a rank, for tests of what the weave must keep in order.

`SCENES` name them. `with scene_runner(folder, ...) as runner: play(runner, SCENES["decode"], "sharded")` runs the steps
of one on this rank: one that fills the context (where there is some), then the step itself; both woven.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenweave.config import EngineConfig
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.rank import open_rank
from tokenweave.engine.runner import Runner
from tokenweave.weave.lanes import Observer
from tokenweave.weave.plan import Plan

BLOCK_SIZE = 4


@dataclass(frozen=True)
class Scene:
    """sequences: (context, new tokens, whether the last of them makes logits) of each; cut: where the step is split."""

    sequences: tuple[tuple[int, int, int], ...]
    cut: int


SCENES = {
    "prefill": Scene(((0, 9, 1), (0, 5, 1)), cut=9),
    "chunked prefill": Scene(((6, 8, 1), (5, 4, 1)), cut=8),
    "decode": Scene(((7, 1, 1), (12, 1, 1), (3, 1, 1), (9, 1, 1)), cut=2),
    "mixed": Scene(((8, 1, 1), (5, 1, 1), (0, 6, 1), (4, 5, 1)), cut=6),
    "cut in a sequence": Scene(((0, 13, 1),), cut=5),  # its first half has no row that makes logits
    "cut in a chunk": Scene(((6, 9, 1), (2, 1, 1)), cut=4),
    "a row each": Scene(((4, 1, 1), (6, 1, 1)), cut=1),
    "a row against many": Scene(((0, 8, 1), (3, 1, 1)), cut=8),
    "one row first": Scene(((0, 8, 1),), cut=1),
    "odd rows": Scene(((0, 3, 1), (4, 4, 1)), cut=3),
    "a half without logits": Scene(((0, 7, 0), (5, 1, 1), (0, 3, 1)), cut=7),
    "no logits at all": Scene(((0, 9, 0),), cut=4),
}


def batches(scene: Scene, seed: int = 0) -> list[Batch]:
    """The context, if there is any, and the step."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(64, generator=generator).tolist()
    context, step = [], []
    for before, count, wanted in scene.sequences:
        tokens = tuple(torch.randint(0, 256, (before + count,), generator=generator).tolist())
        blocks = tuple(free.pop() for _ in range(-(-len(tokens) // BLOCK_SIZE)))
        if before:
            context.append(Span(tokens[:before], 0, blocks, len(tokens)))
        step.append(Span(tokens[before:], before, blocks, len(tokens), wanted))
    return [Batch(tuple(spans)) for spans in (context, step) if spans]


def play(runner: Runner, scene: Scene, form: str, woven: bool = True) -> list[torch.Tensor]:
    """Each step's logits, from a cache of NaN."""
    runner.storage.fill_(float("nan"))
    *context, step = batches(scene)
    plans = [Plan(batch.rows, batch.rows // 2, form) for batch in context] + [Plan(step.rows, scene.cut, form)]
    if not woven:
        plans = [Plan(plan.rows, None, form) for plan in plans]
    return [runner.forward(batch, plan) for batch, plan in zip((*context, step), plans, strict=True)]


@contextmanager
def scene_runner(folder: Path, dtype: str = "float32", observers: tuple[Observer, ...] = ()) -> Iterator[Runner]:
    """This rank's runner, with a cache of 64 blocks of 4 tokens."""
    config = EngineConfig(
        model=str(folder),
        overlap="weave",
        dtype=dtype,
        device="cpu",
        max_num_batched_tokens=64,
        block_size=BLOCK_SIZE,
        num_kv_blocks=64,
        timeout_s=60.0,
        progress=False,
    )
    rank = open_rank(config, observers=observers)
    try:
        yield rank.runner
    finally:
        rank.close()
