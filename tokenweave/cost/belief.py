"""Belief: what is thought of every candidate's time before and after some were measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np

from tokenweave.cost.choice import MODES, Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.redraw import SPREAD, redraw_cost
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk

DRAWS, CPU_DRAWS = 384, 96  # of the model's constants; a CPU has few candidates and no tiles
EFFECTIVE = 16  # draws, at least, that a belief rests on
COUNTING = 1e-3  # a draw of less weight than this share of the largest counts for nothing
MOST_REGRET = 0.05  # of a step's time: how much worse than this an answer is does not matter
GROUPS = 6  # of outcomes that a measurement is thought to tell apart, at most
LEADERS, SAMPLED = 8, 24  # candidates that are weighed as the next to measure: the fastest, and some evenly spread

Case = tuple[int, Choice]  # a prompt's rows, and how its step is run


@dataclass(frozen=True)
class Misfit:
    """What no constants explain, relative: of one candidate's time, of all times of a mode, of all times together, and
    by where the cut is (per quarter of the rows, and squared)."""

    own: float
    mode: float
    scale: float
    cut: float


MISFIT = Misfit(own=0.01, mode=0.03, scale=0.05, cut=0.005)  # of machines whose GEMMs have tiles
CPU_MISFIT = Misfit(own=0.02, mode=0.05, scale=0.5, cut=0.05)


class Posterior(NamedTuple):
    """Of the log seconds of some cases: mean and standard deviation, [cases]; and the draws that they are made of,
    [draws, cases], with their weights."""

    mean: np.ndarray
    deviation: np.ndarray
    weights: np.ndarray
    draws: np.ndarray


class Belief:
    """What the candidates' times may be: those of the cost model with its constants redrawn, and a misfit to each.

    Draws are weighed by how well they explain what was measured. A measurement therefore corrects all candidates that
    hang on the same constants, of other modes, cuts and row counts as well.
    """

    def __init__(self, cases: Sequence[Case], log_s: np.ndarray, misfit: Misfit = MISFIT):
        """log_s: [draws, cases], natural logarithms of seconds."""
        self.index = {case: i for i, case in enumerate(cases)}
        self.log_s, self.own = log_s, misfit.own
        modes = [[misfit.mode * (choice.mode == mode) for _, choice in cases] for mode in MODES]
        shift = np.array([0.0 if choice.cut is None else 4 * choice.cut / rows - 2 for rows, choice in cases])
        cuts, scale = misfit.cut * np.array([shift, shift**2]), np.full(len(cases), misfit.scale)
        self.shared = np.vstack([modes, cuts, scale])  # the misfit's covariance = shared.T @ shared + own**2

    def after(self, measured: Sequence[tuple[Case, float]], noise: float, cases: Sequence[Case] = ()) -> Posterior:
        """The belief of `cases` (none = all), given (case, seconds) with `noise`, relative, of each.

        The draws that explain the measurements count, by their likelihood; where too few would, the likelihood is
        flattened by a factor, and what it then leaves unsaid the draws' own covariance says, as if all were Gaussian.
        """
        columns = np.array([self.index[case] for case in cases or self.index])
        at = np.array([self.index[case] for case, _ in measured], dtype=int)
        misfit = self.shared[:, columns].T @ self.shared[:, at] + self.own**2 * np.equal.outer(columns, at)
        here = self.shared[:, at].T @ self.shared[:, at] + self.own**2 * np.equal.outer(at, at)
        here += noise**2 * np.eye(len(at))
        surprise = np.log([seconds for _, seconds in measured]) - self.log_s[:, at]
        weights, flattened = weigh(surprise, here)
        draws, seen = self.log_s[:, columns], self.log_s[:, at]
        seen = seen - weights @ seen
        unsaid = (1.0 - 1.0 / flattened) * weights[:, np.newaxis] * seen
        gain = np.linalg.solve(here + seen.T @ unsaid, (misfit + (draws - weights @ draws).T @ unsaid).T).T
        draws = draws + surprise @ gain.T
        mean = weights @ draws
        variance = (self.shared[:, columns] ** 2).sum(axis=0) + self.own**2
        variance += ((gain @ here) * gain - 2 * gain * misfit).sum(axis=1) + weights @ (draws - mean) ** 2
        return Posterior(mean, np.sqrt(np.maximum(variance, 1e-12)), weights, draws)


def weigh(surprise: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """(weights of draws by their likelihood, the factor >= 1 that its logarithm was divided by so that enough draws
    count). surprise: [draws, measurements], of a Gaussian with that covariance."""
    unlikely = 0.5 * (surprise * np.linalg.solve(covariance, surprise.T).T).sum(axis=1)
    enough, flattened = min(EFFECTIVE, len(surprise) / 2), 1.0
    while True:
        weights = np.exp((unlikely.min() - unlikely) / flattened)
        weights /= weights.sum()
        if 1.0 / (weights**2).sum() >= enough:
            return weights, flattened
        flattened *= 1.25


def most_telling(posterior: Posterior, noise: float) -> int:
    """The case to measure after which the best answer is expected to be the least worse than the best case."""
    counts = posterior.weights > COUNTING * posterior.weights.max()
    weights, draws = posterior.weights[counts], posterior.draws[counts]
    regret = np.minimum(draws - draws.min(axis=1, keepdims=True), MOST_REGRET)
    leaders = np.argsort(posterior.mean, kind="stable")[:LEADERS]
    sampled = np.linspace(0, draws.shape[1] - 1, SAMPLED).astype(int)
    weighed = dict.fromkeys(int(i) for i in (*leaders, *sampled))
    return min(weighed, key=lambda i: expected_regret(draws[:, i], weights, regret, noise))


def expected_regret(log_s: np.ndarray, weights: np.ndarray, regret: np.ndarray, noise: float) -> float:
    """Of the best answer, once a case was measured that takes `log_s` in each draw. regret: [draws, cases]."""
    order = np.argsort(log_s, kind="stable")
    rank = np.cumsum(weights[order]) / weights.sum()
    deviation = math.sqrt(np.cov(log_s, aweights=weights)) if len(log_s) > 1 else 0.0
    groups = min(GROUPS, 1 + int(2 * deviation / noise))
    group = np.minimum((rank * groups).astype(int), groups - 1)
    return sum(float((weights[one] @ regret[one]).min()) for k in range(groups) if len(one := order[group == k]))


def believe(
    cost: Cost,
    cases: Sequence[Case],
    seed: int,
    *,
    draws: int | None = None,
    spread: float = SPREAD,
    progress: Callable[[], Any] = lambda: None,
) -> Belief:
    """What the cost model believes of `cases`. Deterministic for a seed. draws: None = as many as the machine's
    candidates are worth. progress: called after each draw."""
    random, tiled = Random(seed), bool(cost.hardware.tiles)
    log_s = np.empty((draws or (DRAWS if tiled else CPU_DRAWS), len(cases)))
    for draw in range(len(log_s)):
        drawn = redraw_cost(cost, random, spread)
        log_s[draw] = np.log(list(case_seconds(drawn, cases)))
        progress()
    return Belief(cases, log_s, MISFIT if tiled else CPU_MISFIT)


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
