"""Plan: what was decided for one step. Rank 0 decides, all follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALONE_SMS = (
    16  # of a sum that nothing computes beside: TokenWeave's fused kernel is no faster with more (its Figure 10)
)
BESIDE_SMS = 4  # of one that runs beside GEMMs, which get the rest
MARGIN = 0.95  # auto leaves the baseline only for a plan predicted to take at most this share of its time: timing noise


@dataclass(frozen=True)
class Plan:
    """Split or not, where, and how the sums are formed. One half runs its sums inline, without the comm lane."""

    rows: int
    cut: int | None = None  # the first row of the second half
    form: str = "reference"  # of the sum: "reference" | "sharded"
    reason: str = ""
    attention_sms: int = ALONE_SMS  # of the fused kernel, for the sum after attention
    mlp_sms: int = ALONE_SMS  # and after the MLP
    carve_out: bool = False  # tell the GEMMs beside sums to leave the sums' SMs free

    @property
    def carved_sms(self) -> int:
        """How many SMs GEMMs are told to leave free: in a woven step nearly every one has a sum beside it."""
        return max(self.attention_sms, self.mlp_sms) if self.carve_out and self.cut is not None else 0

    @property
    def sms(self) -> dict[str, int]:
        """By the sites of requests."""
        return {"attn": self.attention_sms, "mlp": self.mlp_sms}

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(start, stop) of each half."""
        if self.cut is None:
            return [(0, self.rows)]
        return [(0, self.cut), (self.cut, self.rows)]


@dataclass(frozen=True)
class StepTimes:
    """Measured seconds of a step by mode ("off", "fused", "weave") and row count: what `auto` decides by on a CPU."""

    seconds: Mapping[str, Mapping[int, float]]

    def predict(self, mode: str, rows: int) -> float:
        """Seconds for `rows` rows: linear between measured counts, and on from the last two."""
        points = sorted(self.seconds[mode].items())
        if len(points) == 1 or rows <= points[0][0]:
            return points[0][1]
        upper = next((i for i in range(1, len(points)) if rows <= points[i][0]), len(points) - 1)
        (x0, y0), (x1, y1) = points[upper - 1], points[upper]
        if rows > x1:
            y0 = min(y0, y1)  # more rows in less time is noise: not to be carried on, down to nothing
        return y0 + (rows - x0) * (y1 - y0) / (x1 - x0)


def plan_step(overlap: str, rows: int, times: StepTimes | None) -> Plan:
    """The plan for a batch of `rows` rows. Pure: the same arguments give the same plan.

    "off", "fused" and "weave" are obeyed ("weave" needs two rows). "auto" takes the mode with the least predicted
    time, and never one that is predicted slower than "off"; without times (world size 1) there is nothing to hide.
    """
    if overlap == "auto":
        return _auto(rows, times)
    return _forced(overlap, rows, f"overlap={overlap}")


def _forced(mode: str, rows: int, reason: str) -> Plan:
    if mode == "weave" and rows >= 2:
        return Plan(rows, (rows + 1) // 2, "sharded", reason, BESIDE_SMS, BESIDE_SMS)
    return Plan(rows, None, "reference" if mode == "off" else "sharded", reason)


def _auto(rows: int, times: StepTimes | None) -> Plan:
    if times is None:
        return _forced("off", rows, "one rank: nothing to hide")
    modes = ("off", "fused", "weave") if rows >= 2 else ("off", "fused")
    predicted = {mode: times.predict(mode, rows) for mode in modes}
    best = min(predicted, key=lambda mode: predicted[mode])
    if predicted[best] > MARGIN * predicted["off"]:
        best = "off"
    listed = ", ".join(f"{mode} {seconds * 1e3:.2f} ms" for mode, seconds in predicted.items())
    return _forced(best, rows, f"predicted {listed}")
