"""Times on one GPU by CUDA events. The host's part does not count: launches queue up behind a kernel that sleeps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

CYCLES_PER_S = 2.0e9  # at least what a GPU's SM clock does: the sleep is never shorter than asked for
LONGEST_SLEEP_S = 0.05


@dataclass
class Contestant:
    """run(i): queue launch i of `launches` on the current stream."""

    run: Callable[[int], object]
    launches: int
    host_s: float = 0.0  # what queueing all launches took at the warm-up

    def queue(self) -> None:
        for i in range(self.launches):
            self.run(i)

    def warm_up(self) -> None:
        self.queue()  # compiles and loads
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        self.queue()
        self.host_s = time.perf_counter() - start_s
        torch.cuda.synchronize()

    def microseconds(self) -> float:
        """Of one launch, on the mean of `launches` back to back."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sleep(2 * self.host_s)
        start.record()
        self.queue()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end) / self.launches


def sleep(seconds: float) -> None:
    """Keep the current stream, and one SM, from going on. Not longer than LONGEST_SLEEP_S."""
    torch.cuda._sleep(int(CYCLES_PER_S * min(seconds + 1e-4, LONGEST_SLEEP_S)))


def interleaved_us(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a launch by contestant and round. All are warmed up, then run in turn."""
    for contestant in contestants.values():
        contestant.warm_up()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            found[name].append(contestant.microseconds())
    return found


def copy_bytes_per_s(device: torch.device, size_bytes: int = 2 << 30, rounds: int = 5) -> float:
    """Of torch's device-to-device copy, bytes read and written both counted."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Contestant(lambda i: target.copy_(source), launches=4)
    times = interleaved_us({"copy": copy}, rounds)["copy"]
    return 2 * size_bytes / (statistics.median(times) * 1e-6)
