"""Figure: one thing that was found, and whether it is good enough."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """least, most: all rounds'. goal: at least this much is a pass, or, where at_most, at most; None: there is none."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    least: float | None = None
    most: float | None = None
    note: str = ""
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        reached = self.value <= self.goal if self.at_most else self.value >= self.goal
        return "pass" if reached else "FAIL"


def spread(
    what: str, values: list[float], unit: str, goal: float | None = None, note: str = "", at_most: bool = False
) -> Figure:
    """The median of all rounds, with their least and most."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Figure(what, median, unit, goal, ordered[0], ordered[-1], note, at_most)
