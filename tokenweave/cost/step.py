"""Step: one batch, ready to be asked what it takes however it is run."""

from __future__ import annotations

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.parts import Block
from tokenweave.cost.work import Batch, BatchAttention, Work
from tokenweave.cost.woven import Woven


class Step:
    """A batch on one of W ranks. Looking at a further choice costs some ten microseconds."""

    def __init__(self, cost: Cost, batch: Batch):
        self.cost, self.batch = cost, batch
        self.attention = {w: BatchAttention(batch, cost.parts.attention(w)) for w in cost.parts.windows}
        self.whole = Work(batch.rows, batch.wanted, {w: sums.whole() for w, sums in self.attention.items()})
        self._woven: dict[int, Woven] = {}
        self._seconds: dict[Choice, float] = {}

    def seconds(self, choice: Choice) -> float:
        """Of the step. An empty batch takes none. Raises ValueError for a cut that leaves a half empty."""
        if self.batch.rows == 0:
            return 0.0
        seconds = self._seconds.get(choice)
        if seconds is None:
            host_s = self.cost.host_s(2 if choice.mode == "weave" else 1)
            seconds = self._seconds[choice] = self.cost.hardware.step_s + max(self.device_s(choice), host_s)
        return seconds

    def device_s(self, choice: Choice) -> float:
        """Of the step's kernels, were the host never late."""
        if choice.mode != "weave":
            return sum(block.repeats * self._block_s(block, choice.mode) for block in self.cost.parts.blocks)
        return self.woven(choice.cut or 0).lay_out(choice.attention_sms or 0, choice.mlp_sms or 0).end_s

    def woven(self, cut: int) -> Woven:
        """The batch cut before row `cut`."""
        if cut not in self._woven:
            self._woven[cut] = Woven(self.cost, self._halves(cut))
        return self._woven[cut]

    def _block_s(self, block: Block, mode: str) -> float:
        """Everything in a row, on one lane."""
        cost, work = self.cost, self.whole
        return sum(
            cost.part_s(part, work, cost.hardware.sms) + cost.request_s(part, work.going(part), mode)
            for part in block.parts
        )

    def _halves(self, cut: int) -> tuple[Work, Work]:
        rows = self.batch.rows
        if not 0 < cut < rows:
            raise ValueError(f"a cut must leave rows on both sides: between 1 and {rows - 1}, got {cut}")
        wanted = self.batch.wanted_from(cut)
        split = {window: sums.halves(cut) for window, sums in self.attention.items()}
        first, second = ({window: pair[i] for window, pair in split.items()} for i in (0, 1))
        return Work(cut, self.batch.wanted - wanted, first), Work(rows - cut, wanted, second)
