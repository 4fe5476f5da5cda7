"""Figures: from seconds by round to what the report states. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

COMPUTE, COMMUNICATION = "nocomm", "communication alone"  # contestants that `ideal` is made of
BEFORE_BASELINE = "off, "  # contestants that begin so are `off` with the sums of one baseline
RUNTIME = f"{BEFORE_BASELINE}runtime"  # `off` with the runtime's own, where there are baselines
SLEEPS = ", sleeps only"  # modes that end so ran on a wire that sends nothing, and only sleeps


@dataclass(frozen=True)
class Spread:
    """Of one figure over all rounds."""

    median: float
    min: float
    max: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.min:{spec}}-{self.max:{spec}})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy does it. Raises ValueError without values."""
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"a percentile needs values and 0 <= percent <= 100, got {len(values)} values and {percent}")
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def ideal(compute_s: Sequence[float], communication_s: Sequence[float]) -> list[float]:
    """What no schedule can beat, round by round: the longer of compute alone and communication alone."""
    return [max(pair) for pair in zip(compute_s, communication_s, strict=True)]


def hidden_share(off_s: float, mode_s: float, ideal_s: float) -> float | None:
    """Of the time that overlap can save, the part that `mode` does; None where there is nothing to save.

    Negative for a mode slower than off.
    """
    return (off_s - mode_s) / (off_s - ideal_s) if off_s > ideal_s else None


def with_ideal(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The contestants' seconds by round, and those of `ideal` where both of its parts were measured.

    `off` is the fastest of what was measured over baselines, where there are any: what a user has without tokenweave.
    """
    rows = with_best_off({name: list(values) for name, values in seconds.items()})
    if COMPUTE in rows and COMMUNICATION in rows:
        rows["ideal"] = ideal(rows[COMPUTE], rows[COMMUNICATION])
    return rows


def baselines_of(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(BEFORE_BASELINE) and not name.endswith(SLEEPS)]


def fastest_off(seconds: Mapping[str, Sequence[float]]) -> str:
    """The one of the least median among `off` and its baselines."""
    return min(("off", *baselines_of(seconds)), key=lambda name: statistics.median(seconds[name]))


def with_best_off(rows: dict[str, list[float]]) -> dict[str, list[float]]:
    """`off` becomes the fastest one, if there are baselines; the runtime's own is kept as RUNTIME."""
    if not baselines_of(rows):
        return rows
    renamed = {RUNTIME if name == "off" else name: values for name, values in rows.items()}
    return {"off": rows[fastest_off(rows)], **renamed}


def baseline(mode: str) -> str:
    """What a mode is compared with: off, on the same wire."""
    return f"off{SLEEPS}" if mode.endswith(SLEEPS) else "off"


def gain(seconds: Mapping[str, Sequence[float]], mode: str) -> Spread:
    """off / mode, round by round: above 1, `mode` is faster."""
    return ratio(seconds, baseline(mode), mode)


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> Spread:
    """slow / fast, round by round."""
    return spread([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


def exposed(seconds: Mapping[str, Sequence[float]], mode: str) -> Spread | None:
    """Seconds of a step beyond compute alone, round by round."""
    if COMPUTE not in seconds:
        return None
    return spread([own - compute for own, compute in zip(seconds[mode], seconds[COMPUTE], strict=True)])


def hidden(seconds: Mapping[str, Sequence[float]], mode: str) -> Spread | None:
    """The share hidden, by medians, as a round's own differences are small ones of large numbers; and its least and
    largest over the rounds in which there was something to hide. None where there is nothing."""
    if "ideal" not in seconds:
        return None
    columns = seconds[baseline(mode)], seconds[mode], seconds["ideal"]
    middle = hidden_share(*map(statistics.median, columns))
    shares = [share for row in zip(*columns, strict=True) if (share := hidden_share(*row)) is not None]
    return None if middle is None else Spread(middle, min(shares, default=middle), max(shares, default=middle))


def varied(values: Sequence[float]) -> float:
    """Largest / least."""
    return max(values) / min(values)


def never_slower(seconds: Mapping[str, Sequence[float]], mode: str) -> bool:
    """Whether `mode` is not slower than off by more than the spread: in one round at least it is as fast."""
    return gain(seconds, mode).max >= 1.0
