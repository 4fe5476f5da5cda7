"""Planner: rank 0's plan for each step, from what the batch is like."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.decide import Decision, Tuned, decide, weave_of
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk
from tokenweave.weave.plan import Plan, StepTimes, plan_step

REMEMBERED = 4096  # plans
KEPT_BITS = 4  # of a context's length: it is rounded to an eighth, so that a growing context is not a new batch
SAFETY = 2  # splitting is looked for from this factor below the rows from which on it paid in trial batches
DECODE_CONTEXTS = (256, 4096)  # of the trial batches

Runs = tuple[tuple[int, Chunk], ...]  # so many of a chunk, in the batch's order


class Span(Protocol):
    """What of the engine's Span counts here."""

    @property
    def context(self) -> int: ...

    @property
    def wanted(self) -> int: ...

    def __len__(self) -> int: ...


class Planner:
    """Plans by a cost model, by measured step times, by tuned plans, or by as many of these as there are.

    A plan is a pure function of `overlap`, of these and of the batch's summary. Making a planner looks at some trial
    batches (tens of milliseconds), so that afterwards one that was never seen costs less than a millisecond, one like
    a batch seen before a dictionary lookup, and one too small to be split hardly that.
    """

    def __init__(
        self,
        overlap: str,
        cost: Cost | None = None,
        times: StepTimes | None = None,
        tuned: Tuned | None = None,
        most_rows: int = 2048,
        carve_out: bool = False,
        captured: Cost | None = None,
        captured_tokens: int = 0,
    ):
        """most_rows: of a step. Without `cost`, plans go by `times` and the number of rows alone. carve_out: of woven
        plans. captured: the cost of steps that run as CUDA graphs: prompts of up to so many tokens, and what decodes.
        """
        self.overlap, self.cost, self.times, self.tuned, self.most_rows = overlap, cost, times, tuned, most_rows
        self.carve_out = carve_out
        self.captured, self.captured_tokens = captured, captured_tokens
        self._by_summary = functools.lru_cache(REMEMBERED)(self._plan_summary)
        self._by_rows = functools.lru_cache(REMEMBERED)(self._plan_unsplit)
        self._is_tuned = functools.lru_cache(REMEMBERED)(lambda rows: bool(tuned and tuned.lookup(rows)))
        self.pays_from: dict[bool, int | None] = {}  # rows, by whether all of them decode; None: never
        for each in (cost, captured):
            if self._models and each is not None and each.hardware.tiles:
                each.reach(most_rows)
        if self._models and overlap == "auto":
            self.pays_from = {decode: self._find_least(decode) for decode in (True, False)}

    def plan(self, spans: Sequence[Span]) -> Plan:
        """The plan for a batch."""
        plan = self._plan(spans)
        return replace(plan, carve_out=True) if self.carve_out and plan.cut is not None else plan

    def _plan(self, spans: Sequence[Span]) -> Plan:
        rows = sum(map(len, spans))
        if not self._models or rows == 0:
            return plan_step(self.overlap, rows, self.times)
        decode = rows == len(spans)
        if self.overlap == "auto" and not self._may_split(rows, decode):
            return self._by_rows(rows, decode)
        return self._by_summary(summarise(spans))

    def under(self, overlap: str) -> Planner:
        """The planner of another mode, by what this one knows; tuned plans are of auto alone."""
        if overlap == self.overlap:
            return self
        tuned = self.tuned if overlap == "auto" else None
        known = (self.most_rows, self.carve_out, self.captured, self.captured_tokens)
        return Planner(overlap, self.cost, self.times, tuned, *known)

    @property
    def basis(self) -> str:
        """What plans go by, for people."""
        if self.overlap != "auto" or (self.cost is not None and self.cost.world_size == 1):
            return f"overlap={self.overlap}"
        if self.tuned is not None:
            return self.tuned.summary
        model = [] if self.cost is None else ["the cost model"]
        return " and ".join([*model, *([] if self.times is None else ["steps timed at start"])]) or "the default"

    @property
    def _models(self) -> bool:
        """Whether the cost model has a say: not where the mode leaves nothing to decide, nor where it knows nothing."""
        if self.cost is None or self.cost.world_size == 1:
            return False
        return self.overlap in ("auto", "weave")

    def _may_split(self, rows: int, decode: bool) -> bool:
        least = self.pays_from[decode]
        return least is not None and rows >= least and not self._is_tuned(rows)

    def _plan_summary(self, runs: Runs) -> Plan:
        batch = Batch(expand(runs))
        step = Step(self._cost_of(batch.rows, all(chunk.tokens == chunk.wanted == 1 for _, chunk in runs)), batch)
        if self.overlap == "weave":
            choice, _ = weave_of(step)
            return plan_of(choice or Choice("fused"), batch.rows, "overlap=weave")
        return as_plan(decide(step, self.times, self.tuned), batch.rows)

    def _plan_unsplit(self, rows: int, decode: bool) -> Plan:
        """What was tuned; or off or fused, which differ by the sums alone, hence by rows alone."""
        step = Step(self._cost_of(rows, decode), trial(rows, decode))
        return as_plan(decide(step, self.times, self.tuned, split=False), rows)

    def _cost_of(self, rows: int, decode: bool) -> Cost:
        """Of a batch of so many rows, which all decode or do not."""
        assert self.cost is not None
        return self.captured if self.captured and (decode or rows <= self.captured_tokens) else self.cost

    def _find_least(self, decode: bool) -> int | None:
        """The rows from which on a batch may be worth splitting."""
        contexts = DECODE_CONTEXTS if decode else (0,)
        for rows in trial_rows(self.most_rows):
            cost = self._cost_of(rows, decode)
            steps = [Step(cost, trial(rows, decode, context)) for context in contexts]
            if any(decide(step, self.times).choice.mode == "weave" for step in steps):
                return max(2, rows // SAFETY)
        return None


def trial(rows: int, decode: bool, context: int = 0) -> Batch:
    """One prompt of `rows` tokens, or so many rows that decode after `context` tokens each."""
    return Batch([Chunk(1, context)] * rows if decode else [Chunk(rows, context)])


def trial_rows(most: int) -> Iterator[int]:
    """2, 3, 4, 6, 8, 12 ... up to `most`, and `most`."""
    power = 2
    while power < most:
        yield power
        if power * 3 // 2 < most:
            yield power * 3 // 2
        power *= 2
    yield most


def summarise(spans: Iterable[Span]) -> Runs:
    """A batch in short: contexts rounded, rows that decode next to each other all alike."""
    runs: list[tuple[int, Chunk]] = []
    contexts: list[int] = []  # of rows that decode, since the last other span
    for span in spans:
        if len(span) == 1 and span.wanted == 1:
            contexts.append(span.context)
        else:
            runs += [*_decoding(contexts), (1, Chunk(len(span), rounded(span.context), span.wanted))]
            contexts = []
    return (*runs, *_decoding(contexts))


def _decoding(contexts: list[int]) -> Runs:
    return ((len(contexts), Chunk(1, rounded(sum(contexts) // len(contexts)))),) if contexts else ()


def rounded(count: int) -> int:
    """Down to its leading bits."""
    dropped = max(0, count.bit_length() - KEPT_BITS)
    return count >> dropped << dropped


def expand(runs: Runs) -> list[Chunk]:
    return [chunk for count, chunk in runs for _ in range(count)]


def as_plan(decision: Decision, rows: int) -> Plan:
    return plan_of(decision.choice, rows, decision.reason)


def plan_of(choice: Choice, rows: int, reason: str) -> Plan:
    """The plan that runs a choice. Raises ValueError for "nocomm", which computes nothing of use."""
    if choice.mode == "nocomm":
        raise ValueError("mode 'nocomm' leaves the sums out; it can be predicted, not run")
    if choice.mode != "weave":
        return Plan(rows, None, "reference" if choice.mode == "off" else "sharded", reason)
    assert choice.attention_sms is not None
    assert choice.mlp_sms is not None
    return Plan(rows, choice.cut, "sharded", reason, choice.attention_sms, choice.mlp_sms)
