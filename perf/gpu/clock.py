"""Clock: wall time of whole calls, the device's work included; contestants in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start_s = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start_s


def in_turn(
    contestants: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, warm_ups: int = 2
) -> dict[str, list[float]]:
    """Seconds by contestant and round; each runs `warm_ups` times before: once to compile, once to capture graphs."""
    for run in contestants.values():
        for _ in range(warm_ups):
            run()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(seconds_of(run, device))
    return found


def median_s(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    return statistics.median(in_turn({"": run}, device, rounds)[""])
