"""Breakdown: where an unsplit step's seconds go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenweave.cost.choice import Choice
from tokenweave.cost.parts import Part
from tokenweave.cost.step import Step


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step by what they wait for; they add up to Step.seconds."""

    gemm_compute_s: float = 0.0  # GEMMs that computing bounds
    gemm_memory_s: float = 0.0  # GEMMs that reading weights bounds
    attention_compute_s: float = 0.0
    attention_memory_s: float = 0.0
    memory_s: float = 0.0  # norms, activations, rotation, cache writes, embedding
    communication_s: float = 0.0
    launch_s: float = 0.0  # gaps between kernels, the host where it is slower than the device, the step's fixed part

    @property
    def bound(self) -> str:
        """What most of the step waits for: "compute", "memory", "link" or "launch"."""
        parts = {
            "compute": self.gemm_compute_s + self.attention_compute_s,
            "memory": self.gemm_memory_s + self.attention_memory_s + self.memory_s,
            "link": self.communication_s,
            "launch": self.launch_s,
        }
        return max(parts, key=lambda part: parts[part])


def break_down(step: Step, mode: str) -> Breakdown:
    """Of the step run as `mode`: "off", "fused" or "nocomm"."""
    sums: dict[str, float] = {}
    for block in step.cost.parts.blocks:
        for part in block.parts:
            for name, seconds in _shares(step, part, mode):
                sums[name] = sums.get(name, 0.0) + block.repeats * seconds
    total_s = step.seconds(Choice(mode))
    return Breakdown(**sums, launch_s=max(0.0, total_s - sum(sums.values())))


def _shares(step: Step, part: Part, mode: str) -> Iterator[tuple[str, float]]:
    cost, work = step.cost, step.whole
    rows, live, sms = work.coming(part), work.going(part), cost.hardware.sms
    for gemms, count in ((part.gemms, rows), (part.live_gemms, live)):
        for gemm in gemms if count else ():
            compute_s, memory_s = gemm.compute_s(count, sms), gemm.memory_s(count)
            yield "gemm_compute_s" if compute_s >= memory_s else "gemm_memory_s", float(max(compute_s, memory_s))
    if part.attends and rows:
        time = work.attention[part.window]
        yield "attention_compute_s", float(max(time.compute_s, time.longest_s)) * live / rows
        yield "attention_memory_s", float(time.memory_s) * live / rows
    yield "memory_s", rows * part.row_bytes / cost.bandwidth
    normed = not part.gathers and live > 0 and (mode != "fused" or cost.world_size == 1)
    yield "memory_s", live * cost.norm_row_s if normed else 0.0
    yield "communication_s", float(cost.request_s(part, work, mode)) - (cost.norm_s(live) if normed else 0.0)
