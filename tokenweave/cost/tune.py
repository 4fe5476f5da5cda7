"""Tuning one step: which way of running it is fastest, in few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tokenweave.cost.belief import Belief, Case, Posterior, expected_improvement, most_telling
from tokenweave.cost.choice import Choice
from tokenweave.cost.hardware import Hardware

CUT_GRAIN = 128  # rows: a cut at a tile's edge wastes none
CUTS = 32  # at most, of one row count
CPU_CUTS = 16  # where there are no tiles: as many equal parts
WORTHWHILE = 1e-3  # of a step's time: no measurement for an expected gain below this
MOST = 64  # measurements of one row count
TELLING = 8  # of them come first that tell most about the machine

Measure = Callable[[Case], float]


def candidates(rows: int, hardware: Hardware, world_size: int) -> list[Choice]:
    """off, fused, and every weave cut between a quarter and three quarters with every pair of SM counts."""
    if world_size == 1:
        return [Choice("off")]
    sms = hardware.communication_sms
    pairs = [(attention, mlp) for attention in sms for mlp in sms]
    woven = [Choice("weave", cut, *pair) for cut in cuts(rows, hardware) for pair in pairs]
    return [Choice("off"), Choice("fused"), *woven]


def cuts(rows: int, hardware: Hardware) -> list[int]:
    """Where to cut: at tiles' edges, or in sixteenths where there are no tiles; the middle always."""
    if rows < 2:
        return []
    grain = CUT_GRAIN * max(1, -(-rows // (2 * CUTS * CUT_GRAIN))) if hardware.tiles else max(1, rows // CPU_CUTS)
    first, last = max(1, -(-rows // 4 // grain) * grain), min(rows - 1, rows * 3 // 4)
    return sorted({*range(first, last + 1, grain), (rows + 1) // 2})


@dataclass
class Search:
    """What was measured of one row count, and what to measure next. Pure: the same measurements, the same proposals."""

    belief: Belief
    cases: Sequence[Case]
    noise: float  # relative, of one measurement
    first: Sequence[Case] = ()  # a neighbour's best: measured to begin with
    known: list[tuple[Case, float]] = field(default_factory=list)  # of other row counts
    measured: list[tuple[Case, float]] = field(default_factory=list)
    given: int = 0  # of those measured, not proposed here

    def __post_init__(self) -> None:
        self._place = {case: i for i, case in enumerate(self.cases)}

    def propose(self) -> Case | None:
        """The next case to measure: the most telling ones, then that of the greatest expected improvement. None: no
        measurement is worth its while."""
        waiting = [case for case in self.first if all(case != done for done, _ in self.measured)]
        if waiting:
            return waiting[0]
        posterior = self._posterior()
        telling = self.given + len(self.first) + (TELLING if len(self.cases) > TELLING else 0)
        if len(self.measured) < max(1, telling):
            return self.cases[most_telling(posterior, self.noise)]
        seen = [self._place[case] for case, _ in self.measured]
        gains = expected_improvement(posterior.mean, posterior.deviation, posterior.mean[seen].min())
        i = int(gains.argmax())
        return self.cases[i] if gains[i] > WORTHWHILE else None

    def take(self, case: Case, seconds: float) -> None:
        self.measured.append((case, seconds))

    def best(self) -> Case:
        """The case believed fastest, measured or not: no lucky measurement wins alone."""
        return self.cases[int(self._posterior().mean.argmin())]

    def _posterior(self) -> Posterior:
        return self.belief.after([*self.known, *self.measured], self.noise, self.cases)


def run_search(search: Search, measure: Measure, most: int = MOST) -> Iterator[Case]:
    """Measure what the search proposes; yields every measured case. Ends by itself, or whenever the caller does."""
    while len(search.measured) < most and (case := search.propose()) is not None:
        seconds = measure(case)
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"a measurement must be a number of seconds > 0, got {seconds!r} for {case}")
        search.take(case, seconds)
        yield case
