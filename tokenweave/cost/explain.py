"""Explain: one step's plan in figures: what each way of running it would take, and why the woven one does or does not
pay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.decide import decide
from tokenweave.cost.parts import SITES
from tokenweave.cost.search import middle
from tokenweave.cost.step import Step, segments_s
from tokenweave.cost.work import Batch, Chunk, Work


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
            return ["one rank has nothing to communicate, or there is one row: nothing can be hidden"]
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
    return Explanation(batch.rows, len(batch.chunks), decision.choice, predicted, decision.candidates, host_s, woven)


def _woven(step: Step, choice: Choice) -> Woven:
    assert choice.cut is not None
    assert choice.attention_sms is not None
    assert choice.mlp_sms is not None
    cost, woven = step.cost, step.woven([choice.cut], [choice.attention_sms, choice.mlp_sms])
    halves_s = segments_s(cost, woven.work)
    sums_s = _sums_s(cost, woven.work, choice.attention_sms, choice.mlp_sms)
    hidden_s = min(sums_s, woven.hidden_s(0, 0, 1))
    return Woven(
        choice=choice,
        seconds=step.seconds(choice),
        halves_s=(float(halves_s[0, 0]), float(halves_s[1, 0])),
        unsplit_segments_s=step.segments_s,
        sums_s=sums_s,
        hidden_s=hidden_s,
        slowdown_s=max(0.0, woven.device_s(0, 0, 1) - float(halves_s.sum()) - (sums_s - hidden_s)),
        middle_s=step.seconds(replace(choice, cut=middle(step.batch.rows))),
    )


def _sums_s(cost: Cost, halves: Work, *sms: int) -> float:
    return float(
        sum(
            block.repeats * cost.request_s(part, halves, "weave", sms[SITES[part.site]])
            for block in cost.parts.blocks
            for part in block.parts
        ).sum()
    )


def _of_split(explanation: Explanation, woven: Woven) -> Iterator[str]:
    choice, rows = woven.choice, explanation.rows
    first_ms, second_ms = (seconds * 1e3 for seconds in woven.halves_s)
    rows_of_halves = f"{choice.cut} + {rows - (choice.cut or 0)} rows"
    if explanation.candidates > 1:
        sms = f"{choice.attention_sms} SMs for sums after attention, {choice.mlp_sms} after the MLP"
        yield f"the best split of {explanation.candidates} looked at: {rows_of_halves}, {sms}"
    else:
        yield f"split so that both halves take about as long: {rows_of_halves}"
    yield f"its halves compute {first_ms:.2f} and {second_ms:.2f} ms, the whole batch {_ms(woven.unsplit_segments_s)}"
    share = woven.hidden_s / woven.sums_s if woven.sums_s else 0.0
    yield (
        f"{share:.0%} of {_ms(woven.sums_s)} of sums are hidden; what computes beside them is slowed by "
        f"{_ms(woven.slowdown_s)}"
    )
    if woven.middle_s > woven.seconds * 1.001:
        lost = woven.middle_s / woven.seconds - 1
        yield f"cut at row {middle(rows)}, the middle, it would take {lost:.1%} longer"
    unsplit_s, split_s = explanation.host_s
    if split_s > woven.seconds * 0.9:
        yield (
            f"launching kernel by kernel takes the host {_ms(unsplit_s)} unsplit and {_ms(split_s)} split: the device "
            "waits for it"
        )


def _of_choice(explanation: Explanation) -> str:
    taken, predicted = explanation.taken.mode, explanation.predicted_s
    if taken == "weave":
        unsplit_s = min(predicted["off"], predicted["fused"])
        return f"split: {unsplit_s / predicted['weave']:.2f}x as fast as the best unsplit way"
    loss = predicted["weave"] / predicted[taken] - 1
    return f"not split: the best split is predicted {loss:.1%} slower than {taken}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
