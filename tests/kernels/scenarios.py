"""Runs of the fused kernel that between them use all its ways, and what is to come of each.

They are small enough for a sanitizer, and for faults to be planted in. Each has repeated launches on one signal pad.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.kernels import reports
from tests.kernels.twin import Outcome, Scenario, compile_twin, prefix, run_twin, wrong
from tokenweave.kernels.fused import Geometry, Variant

BF16, F32 = torch.bfloat16, torch.float32
BLOCKS = [[2], [1], [2]]
NORM = {"residual": True, "norm": True}
GEMMA = {"residual": True, "bias": True, "post_norm": True, "norm": True}
ASKED = {"asked_rank": 0, "asked_ms": 700, "timeout_ms": 60_000}  # its host asks rank 0 to give up
MANY = [[2]] * 20  # launches: if each took a timeout of two seconds it would be more than such a run may take


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


def small(blocks: list[list[int]], sum_by: str = "two_shot", **words: Any) -> Scenario:
    return scenario(Variant(BF16, 64, 4, sum_by, **NORM), Geometry(32, 2), 9, blocks, **words)


RUNS = {
    "two_shot": Run(lambda: scenario(Variant(BF16, 136, 4, "two_shot", **NORM), Geometry(32, 2), 37, BLOCKS)),
    "one_shot": Run(lambda: scenario(Variant(F32, 136, 4, "one_shot", **NORM), Geometry(32, 2), 11, BLOCKS)),
    "multimem": Run(lambda: scenario(Variant(BF16, 520, 4, "multimem", **NORM), Geometry(32, 2), 37, BLOCKS)),
    # eight vectors for each thread, of which not all are in flight, and two warps for a row
    "post_norm": Run(lambda: scenario(Variant(F32, 2040, 4, "two_shot", **GEMMA), Geometry(64, 1, 2), 27, BLOCKS)),
    "listed": Run(
        lambda: scenario(Variant(BF16, 136, 4, "two_shot", listed=True, **NORM), Geometry(64, 1), 19, BLOCKS)
    ),
    # both halves of a step in flight
    "channels": Run(lambda: small(BLOCKS, channels=2)),
    # ranks that soon give up
    "impatient": Run(lambda: small([[2]] * 4, timeout_ms=3000)),
    # one rank stays away, from the first launch on or from a later one
    "dead": Run(lambda: small(MANY, dead_rank=2, timeout_ms=2000), reports.of_dead_rank, 30),
    "dead later": Run(lambda: small(MANY, dead_rank=0, dead_from=3, timeout_ms=2000), reports.of_dead_rank, 30),
    # the same, and long before its time is over a host has its rank give up
    "asked": Run(lambda: small(MANY, dead_rank=2, **ASKED), reports.of_asked_rank, 30),
    "asked later": Run(lambda: small(MANY, dead_rank=2, dead_from=3, channels=2, **ASKED), reports.of_asked_rank, 30),
    # ranks that do not launch the same number of blocks, or rows: they find out at once
    "odd blocks": Run(lambda: small([[2, 2, 1, 2], [2]], timeout_ms=60_000), reports.of_mismatch, 30),
    "odd rows": Run(lambda: small([[2], [2]], claimed_rows=(9, 9, 9, 8), timeout_ms=60_000), reports.of_mismatch, 30),
}
for name in ("dead", "asked", "odd blocks"):  # for faults that would take as long as a run may
    RUNS[f"{name}, hurried"] = replace(RUNS[name], timeout_s=6)
