"""Decide: how to run one step, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tokenweave.cost.choice import Choice
from tokenweave.cost.search import best_weave
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk
from tokenweave.weave.plan import BESIDE_SMS, MARGIN, StepTimes

UNSPLIT = ("off", "fused")


class Tuned(Protocol):
    """Plans found by measuring this model on this machine (cost/tuned.py)."""

    def lookup(self, rows: int) -> Choice | None: ...


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
    """(the woven choice worth considering, how many were looked at). Without tiles no cut wastes anything, and the
    figures of a CPU are too coarse to say more than the middle."""
    rows = step.batch.rows
    if rows < 2 or step.cost.world_size == 1:
        return None, 0
    if not step.cost.hardware.tiles:
        return middle(rows), 1
    found = best_weave(step)
    assert found is not None
    return found.choice, found.candidates


def middle(rows: int) -> Choice:
    """What the runtime does when nobody knows better, and what StepTimes were measured with."""
    return Choice("weave", (rows + 1) // 2, BESIDE_SMS, BESIDE_SMS)


def predict(step: Step, choice: Choice, times: StepTimes | None) -> float:
    """Seconds: of the model; or what was measured of a prompt of as many rows, times what the model says that this
    batch and this choice differ from it by. Beyond the largest measured step a model with tiles knows more than a
    straight line."""
    seconds = step.seconds(choice)
    if times is None:
        return seconds
    rows = step.batch.rows
    at = min(rows, max(2, *times.seconds[choice.mode])) if step.cost.hardware.tiles else rows
    like = middle(at) if choice.mode == "weave" else choice
    return times.predict(choice.mode, at) * seconds / Step(step.cost, Batch([Chunk(at)])).seconds(like)


def _reason(predicted: Mapping[str, float], times: StepTimes | None) -> str:
    listed = ", ".join(f"{mode} {seconds * 1e3:.2f} ms" for mode, seconds in predicted.items())
    return f"predicted {listed}" + ("" if times is None else ", by measured steps")
