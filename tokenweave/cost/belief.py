"""Belief: what is thought of every candidate's time before and after some were measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import numpy as np

from tokenweave.cost.choice import MODES, Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.redraw import SPREAD, redraw_cost
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk

DRAWS = 96  # of the model's constants
# What no constants explain, relative: of one candidate's time, of all times of a mode, of all times together, and by
# where the cut is (per quarter of the rows, and squared), on machines whose GEMMs have tiles and on others.
MISFIT, MODE_MISFIT, SCALE_MISFIT, CUT_MISFIT, CPU_CUT_MISFIT = 0.02, 0.05, 0.5, 0.005, 0.05

Case = tuple[int, Choice]  # a prompt's rows, and how its step is run


class Belief:
    """A Gaussian over the logarithms of the candidates' times.

    The prior is the cost model itself, its constants redrawn: the mean of the draws, and their covariance. A measured
    candidate therefore corrects those that hang on the same constants, of other modes, cuts and row counts as well.
    """

    def __init__(self, cases: Sequence[Case], log_s: np.ndarray, cut_misfit: float = CUT_MISFIT):
        """log_s: [draws, cases], natural logarithms of seconds."""
        self.index = {case: i for i, case in enumerate(cases)}
        self.prior = log_s.mean(axis=0)
        draws = (log_s - self.prior) / math.sqrt(max(1, len(log_s) - 1))
        modes = [[MODE_MISFIT * (choice.mode == mode) for _, choice in cases] for mode in MODES]
        shift = np.array([0.0 if choice.cut is None else 4 * choice.cut / rows - 2 for rows, choice in cases])
        cuts, scale = cut_misfit * np.array([shift, shift**2]), np.full(len(cases), SCALE_MISFIT)
        self.spread = np.vstack([draws, modes, cuts, scale])  # covariance = spread.T @ spread

    def after(self, measured: Sequence[tuple[Case, float]], noise: float) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of every candidate's log seconds, given (case, seconds) with `noise`, relative."""
        variance = (self.spread**2).sum(axis=0) + MISFIT**2
        if not measured:
            return self.prior, np.sqrt(variance)
        at = [self.index[case] for case, _ in measured]
        same = np.equal.outer(np.arange(len(self.prior)), at)
        shared = self.spread.T @ self.spread[:, at] + MISFIT**2 * same
        gain = np.linalg.solve(shared[at] + noise**2 * np.eye(len(at)), shared.T).T
        surprise = np.log([seconds for _, seconds in measured]) - self.prior[at]
        left = variance - (gain * shared).sum(axis=1)
        return self.prior + gain @ surprise, np.sqrt(np.maximum(left, 1e-12))


def believe(
    cost: Cost,
    cases: Sequence[Case],
    seed: int,
    *,
    draws: int = DRAWS,
    spread: float = SPREAD,
    progress: Callable[[], Any] = lambda: None,
) -> Belief:
    """What the cost model believes of `cases`. Deterministic for a seed. progress: called after each draw."""
    random = Random(seed)
    log_s = np.empty((draws, len(cases)))
    for draw in range(draws):
        drawn = redraw_cost(cost, random, spread)
        log_s[draw] = np.log(list(case_seconds(drawn, cases)))
        progress()
    return Belief(cases, log_s, CUT_MISFIT if cost.hardware.tiles else CPU_CUT_MISFIT)


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """By how much each candidate is expected to be below `best`, where it is."""
    z = (best - mean) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.array([math.erf(x / math.sqrt(2)) for x in z]))
    return deviation * (z * below + density)


def case_seconds(cost: Cost, cases: Sequence[Case]) -> Iterator[float]:
    """What the model says of each case."""
    steps = {rows: Step(cost, Batch([Chunk(rows)])) for rows in {rows for rows, _ in cases}}
    for rows, step in steps.items():
        step.all_seconds([choice for of, choice in cases if of == rows])
    return (steps[rows].seconds(choice) for rows, choice in cases)
