"""Step: one batch, ready to be asked what it takes however it is run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.ops import Numbers
from tokenweave.cost.work import Batch, BatchAttention, Work
from tokenweave.cost.woven import Woven


class Step:
    """A batch on one of W ranks."""

    def __init__(self, cost: Cost, batch: Batch):
        cost.reach(batch.rows)
        self.cost, self.batch = cost, batch
        self.attention = {w: BatchAttention(batch, cost.parts.attention(w)) for w in cost.parts.windows}
        self.whole = Work(batch.rows, batch.wanted, {w: sums.whole() for w, sums in self.attention.items()})
        self._seconds: dict[Choice, float] = {}

    def seconds(self, choice: Choice) -> float:
        """Of the step. An empty batch takes none. Raises ValueError for a cut that leaves a half empty."""
        if self.batch.rows == 0:
            return 0.0
        if choice not in self._seconds:
            self.all_seconds([choice])
        return self._seconds[choice]

    def all_seconds(self, choices: Iterable[Choice]) -> list[float]:
        """Of each choice. Many together take hardly longer than one."""
        choices = list(choices)
        unknown = [choice for choice in choices if choice not in self._seconds]
        woven = [choice for choice in unknown if choice.mode == "weave"]
        device_s = {choice: self._plain_s(choice.mode) for choice in unknown if choice.mode != "weave"}
        for choice, seconds in {**device_s, **self._woven_s(woven)}.items():
            self.know(choice, seconds)
        return [self._seconds[choice] for choice in choices]

    def know(self, choice: Choice, device_s: float) -> float:
        """Seconds of a choice whose kernels take `device_s`: the host may need longer."""
        host_s = self.cost.host_s(2 if choice.mode == "weave" else 1)
        self._seconds[choice] = self.cost.hardware.step_s + max(device_s, host_s)
        return self._seconds[choice]

    def device_s(self, choice: Choice) -> float:
        """Of the step's kernels, were the host never late."""
        return self._woven_s([choice])[choice] if choice.mode == "weave" else self._plain_s(choice.mode)

    def woven(self, cuts: Sequence[int] | np.ndarray, counts: Sequence[int]) -> Woven:
        """The batch cut before row `cut`, for each of `cuts`, with sums on each of `counts` SMs."""
        return Woven(self.cost, self.halves(np.asarray(cuts)), counts)

    def halves(self, cuts: np.ndarray) -> Work:
        rows = self.batch.rows
        wrong = cuts[(cuts < 1) | (cuts >= rows)]
        if wrong.size:
            raise ValueError(f"a cut must leave rows on both sides: between 1 and {rows - 1}, got {wrong[0]}")
        second = self.batch.wanted_from(cuts)
        split = {window: sums.halves(cuts) for window, sums in self.attention.items()}
        return Work(np.array([cuts, rows - cuts]), np.array([self.batch.wanted - second, second]), split)

    def _woven_s(self, choices: Sequence[Choice]) -> dict[Choice, float]:
        if not choices:
            return {}
        cuts = {cut: i for i, cut in enumerate(sorted({choice.cut or 0 for choice in choices}))}
        sms = sorted({sms or 0 for choice in choices for sms in (choice.attention_sms, choice.mlp_sms)})
        counts, woven = {count: i for i, count in enumerate(sms)}, self.woven(list(cuts), sms)
        return {
            choice: woven.device_s(
                cuts[choice.cut or 0], counts[choice.attention_sms or 0], counts[choice.mlp_sms or 0]
            )
            for choice in choices
        }

    def _plain_s(self, mode: str) -> float:
        """Everything in a row, on one lane."""
        requests_s = sum(
            block.repeats * self.cost.request_s(part, self.whole, mode)
            for block in self.cost.parts.blocks
            for part in block.parts
        )
        return float(self.segments_s + requests_s)

    @functools.cached_property
    def segments_s(self) -> float:
        """Of the whole batch, without requests."""
        return float(segments_s(self.cost, self.whole))


def segments_s(cost: Cost, work: Work) -> Numbers:
    """Everything that `work` computes, alone on all SMs."""
    return sum(
        block.repeats * cost.segment_s(part, work, cost.hardware.sms)
        for block in cost.parts.blocks
        for part in block.parts
    )
