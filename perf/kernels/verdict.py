"""Verdict: the goals for the fused kernel, and whether measured times meet them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

GOAL_WORLD_SIZE, GOAL_HIDDEN_SIZE, GOAL_DTYPE = 8, 8192, torch.bfloat16


@dataclass(frozen=True)
class Goal:
    """At most so many microseconds for `rows` rows; ctas: by how many CTAs, None = the best count."""

    rows: int
    ctas: int | None
    most_us: float

    def __str__(self) -> str:
        by = "the best count of CTAs" if self.ctas is None else f"{self.ctas} CTAs"
        return f"{self.rows} rows by {by}: at most {self.most_us:g} us"


# TokenWeave's own kernel takes 914 us, 1571 us and 30 us (figure 10 of its artifact). The first two goals are what the
# plain multimem all-reduce needs (figure 7), with a little for the norm.
GOALS = (Goal(8192, 4, 530.0), Goal(8192, 2, 800.0), Goal(256, None, 24.0))


@dataclass(frozen=True)
class Judgement:
    goal: Goal
    measured_us: float | None

    @property
    def passed(self) -> bool:
        return self.measured_us is not None and self.measured_us <= self.goal.most_us

    def __str__(self) -> str:
        measured = "not measured" if self.measured_us is None else f"{self.measured_us:.1f} us"
        return f"{'PASS' if self.passed else 'FAIL'}  {self.goal}; measured: {measured}"


def judge(times_us: Mapping[int, Mapping[int, float]], goals: Sequence[Goal] = GOALS) -> list[Judgement]:
    """times_us: of the fused kernel, by rows and CTAs."""
    return [Judgement(goal, time_of(times_us.get(goal.rows, {}), goal.ctas)) for goal in goals]


def time_of(by_ctas: Mapping[int, float], ctas: int | None) -> float | None:
    return min(by_ctas.values(), default=None) if ctas is None else by_ctas.get(ctas)


def why_not_judged(dry: bool, world_size: int, hidden_size: int, dtype: torch.dtype, name: str) -> str:
    """Why the goals do not apply to a run; "" if they do. name: of the implementation that was measured."""
    if dry:
        return "a dry run is no measurement"
    if name == "sharded":
        return "the kernel was not measured"
    if (world_size, hidden_size, dtype) != (GOAL_WORLD_SIZE, GOAL_HIDDEN_SIZE, GOAL_DTYPE):
        return f"the goals are for {GOAL_WORLD_SIZE} GPUs and hidden {GOAL_HIDDEN_SIZE} in {GOAL_DTYPE}"
    return ""


def word(judgements: Sequence[Judgement], not_judged: str) -> str:
    """PASS, FAIL, or why neither."""
    if not_judged:
        return f"not judged: {not_judged}"
    return "PASS" if judgements and all(each.passed for each in judgements) else "FAIL"
