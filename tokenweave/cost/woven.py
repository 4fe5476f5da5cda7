"""Woven: a batch cut in two, laid out on the two lanes for any SM counts."""

from __future__ import annotations

from collections.abc import Iterator

from tokenweave.cost.cost import Cost
from tokenweave.cost.lanes import Turn, TwoLanes
from tokenweave.cost.parts import Block, Part
from tokenweave.cost.work import Work


class Woven:
    """Two halves of one batch. What a choice of SMs does not change is computed once."""

    def __init__(self, cost: Cost, halves: tuple[Work, Work]):
        self.cost, self.halves = cost, halves
        self._alone: dict[tuple[Part, int], float] = {}
        self._beside: dict[tuple[Part, int, Part, int], float] = {}
        self._sums: dict[tuple[Part, int, int], float] = {}

    def core_s(self, attention_sms: int, mlp_sms: int) -> float:
        """Of the most repeated layers alone, which is what choices differ in: for ranking them fast."""
        return self.lay_out(attention_sms, mlp_sms, (self.cost.core,)).end_s

    def lay_out(self, attention_sms: int, mlp_sms: int, blocks: tuple[Block, ...] | None = None) -> TwoLanes:
        """The lanes, filled as weave() fills them with all blocks, or with those given."""
        sites = {"attn": attention_sms, "qk_norm": attention_sms, "mlp": mlp_sms, "embed": mlp_sms, "head": mlp_sms}
        lanes, before = TwoLanes(), None
        for block in blocks or self.cost.parts.blocks:
            # what is in flight as a block's repeats begin is what its own last part sent
            before = block.parts[-1] if block.repeats > 1 else before
            lanes.run_block(list(self._turns(block, before, sites)), block.repeats)
            before = block.parts[-1]
        return lanes

    def _turns(self, block: Block, before: Part | None, sites: dict[str, int]) -> Iterator[tuple[Turn, Turn]]:
        for part in block.parts:
            yield self._turn(0, part, before, sites), self._turn(1, part, part, sites)
            before = part

    def _turn(self, half: int, part: Part, other: Part | None, sites: dict[str, int]) -> Turn:
        """other: the part of the other half whose request may be in flight."""
        alone_s, sum_s = self._alone_s(half, part), self._sum_s(half, part, sites[part.site])
        if self.cost.world_size == 1:  # nothing to send: the norm stays on the compute lane
            return alone_s + sum_s, alone_s + sum_s, 0.0
        beside_s = alone_s if other is None else self._beside_s(half, part, other, sites[other.site])
        return alone_s, beside_s, sum_s

    def _alone_s(self, half: int, part: Part) -> float:
        key = (part, half)
        if key not in self._alone:
            self._alone[key] = self.cost.part_s(part, self.halves[half], self.cost.hardware.sms)
        return self._alone[key]

    def _beside_s(self, half: int, part: Part, other: Part, sms: int) -> float:
        """While the other half's request takes `sms` SMs and its share of the memory's bandwidth. Never faster."""
        key = (part, half, other, sms)
        if key not in self._beside:
            left = max(1, self.cost.hardware.sms - sms)
            rows = 0 if other.gathers else self.halves[1 - half].going(other)
            taken = self.cost.taken(rows, self._sum_s(1 - half, other, sms))
            beside_s = self.cost.part_s(part, self.halves[half], left, taken)
            self._beside[key] = max(beside_s, self._alone_s(half, part))
        return self._beside[key]

    def _sum_s(self, half: int, part: Part, sms: int) -> float:
        key = (part, half, sms)
        if key not in self._sums:
            self._sums[key] = self.cost.request_s(part, self.halves[half].going(part), "weave", sms)
        return self._sums[key]
