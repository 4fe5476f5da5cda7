"""What a step takes on this machine, by mode and row count: measured when an LLM with overlap="auto" starts."""

from __future__ import annotations

import time
from typing import Any

from tokenweave.weave.plan import StepTimes, plan_step

ROW_COUNTS = (1, 16, 128, 1024)
BUDGET_S = 1.0  # row counts whose step is expected to take longer are left out
REPEATS = 4  # in turn, mode by mode: other work on the machine then slows all of them
LONG_S, LONG_REPEATS = 0.1, 2  # a step that takes long is measured well enough by fewer repeats


def measure_step_times(runner: Any) -> StepTimes:
    """Time real forward passes of every mode. Collective: every rank calls it, and rank 0's figures are the group's.

    Uses the cache's first blocks, so no request may be running.
    """
    seconds: dict[str, dict[int, float]] = {"off": {}, "fused": {}, "weave": {}}
    for rows in fitting(runner):
        expected_s = StepTimes(seconds).predict("off", rows) if seconds["off"] else 0.0
        if expected_s > BUDGET_S:
            break
        repeats = REPEATS if expected_s < LONG_S else LONG_REPEATS
        rounds = [{mode: time_step(runner, mode, rows) for mode in seconds} for _ in range(repeats)]
        for mode in seconds:
            seconds[mode][rows] = min(round_[mode] for round_ in rounds)
        seconds = runner.ranks.gather(seconds)[0]
    if runner.recorder is not None:
        runner.recorder.clear()  # a timeline is of what the user asked for
    return StepTimes(seconds)


def fitting(runner: Any) -> list[int]:
    """Row counts that the cache, the step budget and the model's length have room for. On CUDA the largest step, too:
    there the smaller ones wait for the host, and say little of it."""
    capacity = len(runner.storage) * runner.config.block_size
    most = min(capacity, runner.config.max_num_batched_tokens, runner.max_model_len)
    largest = {most} if runner.ranks.device.type == "cuda" else set()
    return sorted(largest | {rows for rows in ROW_COUNTS if rows <= most})


def time_step(runner: Any, mode: str, rows: int) -> float:
    """Seconds of one forward pass of a prompt of `rows` tokens."""
    batch = runner.blank_batch(rows)
    runner.ranks.gather(None)  # all ranks start together
    start_s = time.perf_counter()
    runner.forward(batch, plan_step(mode, rows, None))
    runner.synchronize()
    return time.perf_counter() - start_s
