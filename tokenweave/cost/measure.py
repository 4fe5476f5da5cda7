"""What a step takes on this machine, by mode and row count, and whether GEMMs should leave the sums' SMs free: measured
when an LLM starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from tokenweave.weave.plan import Plan, StepTimes, plan_step

log = logging.getLogger(__name__)
ROW_COUNTS = (1, 16, 128, 1024)
BUDGET_S = 1.0  # row counts whose step is expected to take longer are left out
REPEATS = 4  # in turn, mode by mode: other work on the machine then slows all of them
LONG_S, LONG_REPEATS = 0.1, 2  # a step that takes long is measured well enough by fewer repeats
WARM_UPS = 2  # the first step of a kind compiles, the second may be captured
CARVING_ROWS = 4096  # at most, of the step that is woven with and without a carve-out
WORTH = 0.99  # a carve-out is taken where its step takes at most this share of the other's time


def measure_step_times(runner: Any, carve_out: bool = False) -> StepTimes:
    """Time real forward passes of every mode. Collective: every rank calls it, and rank 0's figures are the group's.

    carve_out: of woven steps. Uses the cache's first blocks, so no request may be running.
    """
    seconds: dict[str, dict[int, float]] = {"off": {}, "fused": {}, "weave": {}}
    for rows in fitting(runner):
        expected_s = StepTimes(seconds).predict("off", rows) if seconds["off"] else 0.0
        if expected_s > BUDGET_S:
            break
        repeats = REPEATS if expected_s < LONG_S else LONG_REPEATS
        plans = {mode: replace(plan_step(mode, rows, None), carve_out=carve_out) for mode in seconds}
        rounds = [{mode: time_step(runner, plan) for mode, plan in plans.items()} for _ in range(repeats)]
        for mode in seconds:
            seconds[mode][rows] = min(round_[mode] for round_ in rounds)
        seconds = runner.ranks.gather(seconds)[0]
    return StepTimes(seconds)


def measure_carve_out(runner: Any) -> bool:
    """Whether GEMMs are to leave the sums' SMs free: what rank 0 finds. Collective.

    False, and nothing is measured, where it is not known how many SMs sums take, or GEMMs cannot be told.
    """
    ranks = runner.ranks
    if ranks.world_size == 1 or not all(ranks.gather(runner.carves)):
        return False
    return ranks.gather(carving_pays(partial(time_step, runner), fitting(runner)[-1]))[0]


def carving_pays(seconds: Callable[[Plan], float], most_rows: int) -> bool:
    """Whether a woven step, timed by `seconds`, is faster if its GEMMs leave the sums' SMs free (kernels/gemm_sms.py).

    Whole steps, of at most `most_rows` rows: what GEMMs gain or lose by it, and what sums do, counts together.
    """
    woven = plan_step("weave", min(most_rows, CARVING_ROWS), None)
    if woven.cut is None:
        return False
    plans = [woven, replace(woven, carve_out=True)]
    rounds = [[seconds(plan) for plan in plans] for _ in range(WARM_UPS + REPEATS)]
    all_s, left_s = map(min, zip(*rounds[WARM_UPS:], strict=True))
    found = f"{1e3 * all_s:.2f} ms with GEMMs on all SMs, {1e3 * left_s:.2f} ms with GEMMs on those that sums leave"
    log.info("a woven step of %d rows takes %s", woven.rows, found)
    return left_s <= WORTH * all_s


def fitting(runner: Any) -> list[int]:
    """Row counts that the cache, the step budget and the model's length have room for. On CUDA the largest step, too:
    there the smaller ones wait for the host, and say little of it."""
    capacity = len(runner.storage) * runner.config.block_size
    most = min(capacity, runner.config.max_num_batched_tokens, runner.max_model_len)
    largest = {most} if runner.ranks.device.type == "cuda" else set()
    return sorted(largest | {rows for rows in ROW_COUNTS if rows <= most})


def time_step(runner: Any, plan: Plan) -> float:
    """Seconds of one forward pass of a prompt."""
    batch = runner.blank_batch(plan.rows)
    runner.ranks.gather(None)  # all ranks start together
    start_s = time.perf_counter()
    runner.forward(batch, plan)
    runner.synchronize()
    return time.perf_counter() - start_s
