"""Explain: one step's plan in figures: what each way of running it would take, and why the woven one does or does not
pay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.decide import decide
from tokenweave.cost.search import middle
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk


@dataclass(frozen=True)
class Woven:
    """The best woven choice, in seconds of the device. halves_s: each half's segments, alone on all SMs.

    unsplit_segments_s: the whole batch's. sums_s, hidden_s: of the halves' sums, and what of them is hidden.
    slowdown_s: what sums take from the segments beside them. middle_s: the step cut in the middle instead."""

    choice: Choice
    seconds: float
    halves_s: tuple[float, float]
    unsplit_segments_s: float
    sums_s: float
    hidden_s: float
    slowdown_s: float
    middle_s: float


@dataclass(frozen=True)
class Explanation:
    """taken: what overlap="auto" does. predicted_s: by mode. host_s: what the host needs to launch a step's kernels:
    (unsplit, split); a step is no faster. candidates: woven choices that were looked at."""

    rows: int
    chunks: int
    taken: Choice
    predicted_s: Mapping[str, float]
    candidates: int
    host_s: tuple[float, float]
    woven: Woven | None

    @property
    def reasons(self) -> list[str]:
        """In words."""
        if self.woven is None:
            return ["one GPU has nothing to communicate, or there is one row: nothing can be hidden"]
        return [*_of_split(self, self.woven), _of_choice(self)]


def explain(cost: Cost, chunks: tuple[Chunk, ...]) -> Explanation:
    """Of one step. Raises ValueError for an empty batch."""
    batch = Batch(chunks)
    if batch.rows == 0:
        raise ValueError("a batch without tokens has no plan; give at least one token")
    step = Step(cost, batch)
    decision = decide(step)
    woven = None if decision.woven is None else _woven(step, decision.woven)
    host_s = cost.host_s(1), cost.host_s(2)
    predicted = dict(decision.predicted_s) or {"off": step.seconds(Choice())}
    return Explanation(
        batch.rows, len(batch.chunks), decision.choice, predicted, decision.candidates, host_s, woven
    )


def _woven(step: Step, choice: Choice) -> Woven:
    assert choice.cut is not None
    assert choice.attention_sms is not None
    assert choice.mlp_sms is not None
    cost, woven = step.cost, step.woven(choice.cut)
    lanes = woven.lay_out(choice.attention_sms, choice.mlp_sms)
    alone_s = [_segments_s(cost, half) for half in woven.halves]
    cut = middle(step.batch.rows)
    at_middle = Choice("weave", cut, choice.attention_sms, choice.mlp_sms)
    sums_s = woven.sums_s(choice.attention_sms, choice.mlp_sms)
    return Woven(
        choice,
        step.seconds(choice),
        (alone_s[0], alone_s[1]),
        _segments_s(cost, step.whole),
        sums_s,
        min(sums_s, lanes.hidden_s),
        lanes.slowed_s,
        step.seconds(at_middle),
    )
