"""Session: tuning a model on this machine, row count by row count, within a budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenweave.cost.belief import believe
from tokenweave.cost.choice import Choice
from tokenweave.cost.chunk import best_chunk
from tokenweave.cost.cost import Cost
from tokenweave.cost.tune import Case, Measure, Search, candidates, run_search
from tokenweave.cost.tuned import GRAIN, Measurement, Tuned, TunedLimits, TunedStep, scaled

FIRST_REPEATS = 3  # of the baseline: they show the noise
LEAST_NOISE, MOST_NOISE = 0.01, 0.3  # relative
CONFIRMING = 5  # rounds, a plan in turn with the one that it is to replace:
WIN = 0.99  # it must take less than this share of its time, and win by more than the standard error of the rounds,
WIN_OLDER = 3.0  # and by so many of them against an older result
DEFAULT_SMS = 4  # after attention and after the MLP, of a weave that nobody chose
THRESHOLD_STEPS = 16  # where GEMMs have no tiles, a threshold is found to this share of the row count above it


class OutOfTimeError(Exception):
    """The budget is spent."""


@dataclass
class Session:
    """Finds the best plans for steps of `rows`. Deterministic but for `measure` and `clock`.

    measure: (rows, choice) -> seconds of one step. clock: -> seconds. budget_s: no measurement starts later, but for
    those that confirm a plan. seed: of the model's redrawn constants. stored: plans of the same key, or of the one most
    like it. report: called with what was just done, in words.
    """

    cost: Cost
    rows: Sequence[int]
    measure: Measure
    clock: Callable[[], float]
    budget_s: float
    seed: int = 0
    stored: Tuned | None = None
    same_key: bool = False  # whether `stored` is of the same model, W and machine
    report: Callable[[str], None] = lambda words: None
    measured: list[Measurement] = field(default_factory=list)
    steps: list[TunedStep] = field(default_factory=list)

    def run(self) -> tuple[list[TunedStep], TunedLimits | None]:
        """(steps by row count, limits), as far as the budget reached; without any step there are no limits."""
        end_s = self.clock() + self.budget_s
        cases = [(rows, choice) for rows in self.rows for choice in self._choices(rows)]
        self.belief = believe(self.cost, list(dict.fromkeys([*cases, *self._known_cases()])), self.seed)
        for i, rows in enumerate(sorted(self.rows)):
            now_s = self.clock()
            self._deadline_s = now_s + (end_s - now_s) / (len(self.rows) - i + 1)  # one share is the threshold's
            self._tune(rows)
        self._deadline_s = end_s
        return self.steps, self._limits() if self.steps else None

    # -- one row count -------------------------------------------------------------------------------------------------

    def _tune(self, rows: int) -> None:
        """Search until nothing more is expected of it or its share of the budget is spent; then confirm."""
        search = self._search(rows)
        try:
            search.measured += [(case, self._take(*case)) for case in [(rows, Choice("off"))] * FIRST_REPEATS]
            search.given = FIRST_REPEATS
            search.noise = noise_of([seconds for _, seconds in search.measured])
            for _ in run_search(search, lambda case: self._take(*case)):
                self.report(f"{rows} rows: {describe(search.best()[1])} of {len(search.measured)} measured")
        except OutOfTimeError:
            if len(search.measured) < FIRST_REPEATS:
                return
        self._deadline_s = math.inf  # a few steps more, so that nothing is stored unconfirmed
        self.steps.append(self._confirmed(rows, search.best()[1]))

    def _search(self, rows: int) -> Search:
        """Everything measured before, of other row counts as well, is known to it."""
        stored = [m for step in self.stored.steps for m in step.measured] if self.stored and self.same_key else []
        known = [((m.rows, m.choice), m.seconds) for m in [*stored, *self.measured]]
        cases = [(rows, choice) for choice in self._choices(rows)]
        return Search(self.belief, cases, MOST_NOISE, self._first(rows), known)

    def _first(self, rows: int) -> list[Case]:
        """Measured in any case: "fused", the plain weave, and what served the nearest stored step."""
        near = self.stored.nearest(rows) if self.stored else None
        wanted = [Choice("fused"), *self._plain(rows), *([scaled(near.choice, near.rows, rows)] if near else [])]
        possible = self._choices(rows)
        return [(rows, choice) for choice in dict.fromkeys(wanted) if choice in possible]

    def _choices(self, rows: int) -> list[Choice]:
        near = self.stored.nearest(rows) if self.stored else None
        listed = candidates(rows, self.cost.hardware, self.cost.world_size)
        extra = [scaled(near.choice, near.rows, rows)] if near and rows > 1 else []
        sms = self.cost.hardware.communication_sms
        usable = [
            choice for choice in extra if choice.mode == "weave" and {choice.attention_sms, choice.mlp_sms} <= {*sms}
        ]
        return list(dict.fromkeys([*listed, *usable]))

    def _known_cases(self) -> list[Case]:
        stored = self.stored.steps if self.stored and self.same_key else ()
        return [(m.rows, m.choice) for step in stored for m in step.measured]

    def _confirmed(self, rows: int, best: Choice) -> TunedStep:
        """What was stored for so many rows, off or fused, the plain weave, the fastest on record and `best`: each where
        it wins in turn with the best of those before it. What is stored is therefore no slower than any default, and
        an older result stays unless a new one is better, up to noise."""
        unsplit = self._faster(rows, Choice("off"), Choice("fused")) if self.cost.world_size > 1 else Choice("off")
        older = [choice for choice in self._older(rows) if choice.mode == "weave"]
        choice, *others = dict.fromkeys([*older, unsplit, *self._plain(rows), self._on_record(rows), best])
        for other in others:
            if other == unsplit or other.mode == "weave":
                choice = self._faster(rows, choice, other, WIN_OLDER if choice in older else 1.0)
        mine = tuple(m for m in self.measured if m.rows == rows)
        return TunedStep(rows, choice, self._median_s(rows, choice), unsplit.mode, self._median_s(rows, unsplit), mine)

    def _older(self, rows: int) -> list[Choice]:
        """What an earlier session stored for this key and row count, if it can be run."""
        steps = self.stored.steps if self.stored and self.same_key else ()
        return [step.choice for step in steps if step.rows == rows and step.choice in self._choices(rows)]

    def _plain(self, rows: int) -> list[Choice]:
        """The weave in the middle with DEFAULT_SMS, or what is nearest to that; none where nothing can be woven."""
        woven = [choice for choice in self._choices(rows) if choice.mode == "weave"]
        return sorted(woven, key=lambda choice: distance_from_plain(choice, rows))[:1]

    def _on_record(self, rows: int) -> Choice:
        """The fastest in the median of its measurements."""
        tried = dict.fromkeys(m.choice for m in self.measured if m.rows == rows)
        return min(tried, key=lambda choice: self._median_s(rows, choice))

    # -- limits --------------------------------------------------------------------------------------------------------

    def _limits(self) -> TunedLimits:
        """Of all steps that are known by now, those of earlier sessions as well."""
        earlier = self.stored.steps if self.stored and self.same_key else ()
        by_rows = {step.rows: step for step in (*earlier, *self.steps)}
        steps = [by_rows[rows] for rows in sorted(by_rows)]
        return TunedLimits(self._threshold(steps), best_chunk(self.cost, steps))

    def _threshold(self, steps: Sequence[TunedStep]) -> int | None:
        """The row count from which on weaving wins: between the last step that is better unsplit and the next one."""
        split = [step.choice.mode == "weave" for step in steps]
        if not split[-1]:
            return None
        first = max((i + 1 for i, is_split in enumerate(split) if not is_split), default=0)
        low, step = (steps[first - 1].rows if first else 0), steps[first]
        high, grain = step.rows, GRAIN if self.cost.hardware.tiles else max(1, step.rows // THRESHOLD_STEPS)
        try:
            while first and high - low > grain:
                middle = low + -(-(high - low) // 2 // grain) * grain
                woven = scaled(step.choice, step.rows, middle)
                wins = self._faster(middle, Choice(step.unsplit), woven) == woven
                low, high = (low, middle) if wins else (middle, high)
                self.report(f"splitting pays from between {low} and {high} rows on")
        except OutOfTimeError:
            pass  # `high` is known to win
        return high

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _faster(self, rows: int, one: Choice, other: Choice, errors: float = 1.0) -> Choice:
        """`other`, if it is clearly faster in the median of rounds, each of both in turn: by so many of its errors."""
        rounds = [(self._take(rows, one), self._take(rows, other)) for _ in range(CONFIRMING)]
        ratios = [theirs / ours for ours, theirs in rounds]
        return other if statistics.median(ratios) < min(WIN, 1.0 - errors * error_of_median(ratios)) else one

    def _take(self, rows: int, choice: Choice) -> float:
        if self.clock() > self._deadline_s:
            raise OutOfTimeError
        seconds = self.measure((rows, choice))
        self.measured.append(Measurement(rows, choice, seconds))
        return seconds

    def _median_s(self, rows: int, choice: Choice) -> float:
        return statistics.median(m.seconds for m in self.measured if (m.rows, m.choice) == (rows, choice))


def noise_of(seconds: Sequence[float]) -> float:
    """The relative noise of one measurement, by repeats of one step."""
    return min(MOST_NOISE, max(LEAST_NOISE, statistics.stdev(map(math.log, seconds))))


def error_of_median(values: Sequence[float]) -> float:
    """The standard error of the median of values that scatter normally; their spread by the mean distance from it, so
    that one disturbed value does not rule."""
    middle = statistics.median(values)
    deviation = statistics.fmean(abs(value - middle) for value in values) * math.sqrt(math.pi / 2)
    return math.sqrt(math.pi / 2 / len(values)) * deviation


def distance_from_plain(choice: Choice, rows: int) -> tuple[float, int]:
    cut, sms = choice.cut or 0, (choice.attention_sms or 0, choice.mlp_sms or 0)
    return abs(cut - rows / 2), sum(abs(count - DEFAULT_SMS) for count in sms)


def describe(choice: Choice) -> str:
    if choice.mode != "weave":
        return choice.mode
    counts = choice.attention_sms, choice.mlp_sms
    return f"weave at {choice.cut}" + ("" if counts == (1, 1) else f", {counts[0]}/{counts[1]} SMs")  # a CPU has none
