"""Runs of the fused kernel that between them use all its ways, and what is to come of each.

They are small enough for a sanitizer, and for faults to be planted in. Each has repeated launches on one signal pad.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.kernels.twin import Outcome, Scenario, compile_twin, prefix, run_twin, wrong, wrong_numbers
from tokenweave.kernels.fused import REASONS, Geometry, Report, Variant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BLOCKS = [[2], [1], [2]]
NORM = {"residual": True, "norm": True}
GEMMA = {"residual": True, "bias": True, "post_norm": True, "norm": True}
MANY = 40  # launches: if each of them took a timeout, a dead peer would take longer than a run may
DEAD = 2  # the rank that stays away


@dataclass(frozen=True)
class Run:
    """A scenario, what is wrong with an outcome of it (None: nothing), and how long it may take."""

    scenario: Callable[[], Scenario]
    wrong: Callable[[Scenario, Outcome], str | None] = wrong
    timeout_s: float = 120.0


def problem(run: Run, folder: Path, flags: tuple[str, ...] = (), source: Path | None = None) -> str | None:
    """What goes wrong when the scenario is run with the kernel in `source`, compiled with g++'s `flags`, or None."""
    scenario = run.scenario()
    program = compile_twin(scenario.variant, scenario.layout, folder, *flags, source=source)
    try:
        outcome = run_twin(program, scenario, folder, prefix(flags), run.timeout_s)
    except subprocess.TimeoutExpired:
        return f"hang: nothing within {run.timeout_s} s"
    return run.wrong(scenario, outcome)


def scenario(variant: Variant, layout: Geometry, rows: int, blocks: list[list[int]], **words: Any) -> Scenario:
    """Of a listed variant, with a list of some rows; of a post-normed one, with norms as Gemma has them."""
    if variant.listed:
        listed = sorted(random.Random(rows).sample(range(3 * rows), rows))
        words = {"residual_rows": 3 * rows, "listed": tuple(listed), **words}
    offset = 1.0 if variant.post_norm else 0.0
    return Scenario(variant, layout, rows, blocks, offset=offset, post_offset=offset, **words)


def small(blocks: list[list[int]], kind: str = "two_shot", **words: Any) -> Scenario:
    return scenario(Variant(BF16, 64, 4, kind, **NORM), Geometry(32, 2), 9, blocks, **words)


# -- what a report must say ----------------------------------------------------------------------------------------------


def dead_rank_is_not_named(scenario: Scenario, outcome: Outcome) -> str | None:
    """Whoever waited for the dead rank says so, or who told it."""
    if outcome.returncode:
        return f"exit code {outcome.returncode}: {outcome.stderr[-2000:]}"
    reports = outcome.reports
    others = [rank for rank in range(scenario.variant.world_size) if rank != scenario.dead_rank]
    timeouts = [rank for rank in others if REASONS.get(reports[rank].reason) == "timeout"]
    if not timeouts:
        return "nobody reports a timeout"
    for rank in others:
        words = arrival(scenario, 2 * scenario.dead_from + 1), arrival(scenario, 2 * scenario.dead_from)
        if far := misreport(reports[rank], rank, scenario.dead_rank, timeouts, words, scenario.channels):
            return f"rank {rank} reports {far}"
        if {len(each[rank]) for each in outcome.hidden} != {scenario.launches}:
            return f"rank {rank} does not come back from every launch"
    return wrong_numbers(scenario, before(outcome, others), scenario.dead_from)


def before(outcome: Outcome, others: list[int]) -> Outcome:
    return outcome


def arrival(scenario: Scenario, epoch: int) -> int:
    """The signal of a rank that arrives in this epoch; 0 if that was never."""
    return epoch << 32 | scenario.rows << 12 | scenario.blocks[0][0] if epoch else 0
