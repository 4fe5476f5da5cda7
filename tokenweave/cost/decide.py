"""Decide: how to run one step, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tokenweave.cost.choice import Choice
from tokenweave.cost.search import best_weave
from tokenweave.cost.step import Step, segments_s
from tokenweave.cost.work import Batch, Chunk
from tokenweave.weave.plan import BESIDE_SMS, MARGIN, StepTimes

UNSPLIT = ("off", "fused")
EVEN_CUTS = 128


class Tuned(Protocol):
    """Plans found by measuring this model on this machine (cost/tuned.py)."""

    def lookup(self, rows: int) -> Choice | None: ...

    @property
    def summary(self) -> str: ...


@dataclass(frozen=True)
class Decision:
    """The choice, the predicted seconds of the best way to run each mode (empty where a tuned plan says it all), the
    woven choice that was the best of `candidates`, whether or not it was taken, and the reason in words."""

    choice: Choice
    predicted_s: Mapping[str, float]
    woven: Choice | None
    candidates: int
    reason: str


def decide(step: Step, times: StepTimes | None = None, tuned: Tuned | None = None, *, split: bool = True) -> Decision:
    """How to run a step. Pure: the same arguments, the same decision.

    What was tuned goes first. Else the least predicted time wins: of the cost model alone, or, with times measured on
    this machine, of the model held against them. Never a choice predicted slower than an unsplit one; and by measured
    times, which are noisy, none that gains less than they can tell. split: False = do not look at splitting.
    """
    rows = step.batch.rows
    if tuned is not None and (choice := tuned.lookup(rows)) is not None:
        return Decision(choice, {}, None, 0, f"tuned on this machine for about {rows} rows")
    if step.cost.world_size == 1 or rows == 0:
        return Decision(Choice(), {}, None, 0, "one rank: nothing to hide" if rows else "nothing to compute")
    choices = {mode: Choice(mode) for mode in UNSPLIT}
    woven, candidates = weave_of(step) if split else (None, 0)
    if woven is not None:
        choices["weave"] = woven
    predicted = {mode: predict(step, choice, times) for mode, choice in choices.items()}
    best = min(predicted, key=lambda mode: predicted[mode])
    if times is not None and predicted[best] > MARGIN * predicted["off"]:
        best = "off"
    return Decision(choices[best], predicted, woven, candidates, _reason(predicted, times))


def weave_of(step: Step) -> tuple[Choice | None, int]:
    """(the woven choice worth considering, how many were looked at)."""
    rows = step.batch.rows
    if rows < 2 or step.cost.world_size == 1:
        return None, 0
    if not step.cost.hardware.tiles:
        return even(step), 1
    found = best_weave(step)
    assert found is not None
    return found.choice, found.candidates


def even(step: Step) -> Choice:
    """The cut whose halves take as long, a row's sums counted as a mean row's computing.

    Without tiles no cut wastes anything, and the figures of a CPU are too coarse to lay out lanes by. But that the
    later rows of a prompt attend to more keys is known; and where sums take much more or less time than computing, the
    cut matters little.
    """
    cuts = even_cuts(step.batch.rows)
    computing = segments_s(step.cost, step.halves(cuts)) / step.segments_s
    first, second = computing + np.array([cuts, step.batch.rows - cuts]) / step.batch.rows
    return Choice("weave", int(cuts[np.abs(first - second).argmin()]), BESIDE_SMS, BESIDE_SMS)


def even_cuts(rows: int) -> np.ndarray:
    """At most EVEN_CUTS, evenly spread, the middle among them."""
    grain = max(1, rows // EVEN_CUTS)
    return np.unique([(rows + 1) // 2, *range(grain, rows, grain)])


def measured(step: Step) -> Choice:
    """What stands for the woven times that were measured of a prompt: they were cut in the middle, and on a CPU the
    cut of `even` is as good at the least."""
    if not step.cost.hardware.tiles:
        return even(step)
    return Choice("weave", (step.batch.rows + 1) // 2, BESIDE_SMS, BESIDE_SMS)


def predict(step: Step, choice: Choice, times: StepTimes | None) -> float:
    """Seconds: of the model; or what was measured of a prompt of as many rows, times what the model says that this
    batch and this choice differ from it by. Beyond the largest measured step a model with tiles knows more than a
    straight line."""
    seconds = step.seconds(choice)
    if times is None:
        return seconds
    rows = step.batch.rows
    at = min(rows, max(2, *times.seconds[choice.mode])) if step.cost.hardware.tiles else rows
    prompt = Step(step.cost, Batch([Chunk(at)]))
    return (
        times.predict(choice.mode, at)
        * seconds
        / prompt.seconds(measured(prompt) if choice.mode == "weave" else choice)
    )


def _reason(predicted: Mapping[str, float], times: StepTimes | None) -> str:
    listed = ", ".join(f"{mode} {seconds * 1e3:.2f} ms" for mode, seconds in predicted.items())
    return f"predicted {listed}" + ("" if times is None else ", by measured steps")
