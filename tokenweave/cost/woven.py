"""Woven: a batch cut in two, laid out on the two lanes for any SM counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from tokenweave.cost.cost import Cost, Segment, usual_sms
from tokenweave.cost.lanes import Turn, TwoLanes
from tokenweave.cost.parts import Block, Part
from tokenweave.cost.work import Work

SITES = {"attn": 0, "qk_norm": 0, "mlp": 1, "embed": 1, "head": 1}  # which of a choice's two SM counts a request gets


class Woven:
    """Two halves of one batch. What a choice of SMs does not change is computed once."""

    def __init__(self, cost: Cost, halves: tuple[Work, Work]):
        self.cost, self.halves = cost, halves
        self._segments: dict[tuple[Part, int], tuple[Segment, float]] = {}
        self._sums: dict[tuple[int, int], tuple[float, float]] = {}

    def best_sms(self, slack: float = 0.0) -> tuple[float, int, int]:
        """(seconds of a round of the core, its most repeated layers; the SM counts that make it least, but for a share
        of `slack`).

        Exact without laying out anything: a segment starts when its own sum ends, which is when, or after, the other
        half's begins. So each segment runs beside one sum, of one site, and the two last as long as the longer.
        """
        counts = usual_sms(self.cost.hardware)
        attention_s, attention_sms = self._best_of_site(0, counts, 1.0 - slack)
        mlp_s, mlp_sms = self._best_of_site(1, counts, 1.0 - slack)
        return attention_s + mlp_s, attention_sms, mlp_sms

    def lay_out(self, attention_sms: int, mlp_sms: int, blocks: tuple[Block, ...] | None = None) -> TwoLanes:
        """The lanes, filled as weave() fills them with all blocks, or with those given."""
        sms = (attention_sms, mlp_sms)
        lanes, before = TwoLanes(), None
        for block in blocks or self.cost.parts.blocks:
            # what is in flight as a block's repeats begin is what its own last part sent
            before = block.parts[-1] if block.repeats > 1 else before
            lanes.run_block(list(self._turns(block, before, sms)), block.repeats)
            before = block.parts[-1]
        return lanes

    def _best_of_site(self, site: int, counts: Iterable[int], worth: float) -> tuple[float, int]:
        """(seconds of the core's segments that run beside sums of that site, the SM count that makes them least)."""
        parts = self.cost.core.parts
        # beside the first half's sum the second computes the same part, beside the second's the first the next
        stages = [
            (half, part, other, self._alone_s(half, part))
            for other, after in zip(parts, (*parts[1:], parts[0]))
            if SITES[other.site] == site
            for half, part in ((1, other), (0, after))
        ]
        best_s, best_sms = math.inf, 0
        for sms in counts:
            sums = [self._sum(1 - half, other, sms) for half, _, other, _ in stages]
            if sum(max(sum_s, stage[3]) for (sum_s, _), stage in zip(sums, stages)) >= worth * best_s:
                continue  # not even if the sums took nothing from the segments
            seconds = 0.0
            for (half, part, _, alone_s), (sum_s, taken) in zip(stages, sums):
                beside_s = self._beside_s(half, part, sms, taken)
                seconds += sum_s if beside_s <= sum_s else sum_s + (1.0 - sum_s / beside_s) * alone_s
            best_s, best_sms = min((best_s, best_sms), (seconds, sms))
        return best_s, best_sms

    def _turns(self, block: Block, before: Part | None, sms: tuple[int, int]) -> Iterator[tuple[Turn, Turn]]:
        for part in block.parts:
            yield self._turn(0, part, before, sms), self._turn(1, part, part, sms)
            before = part

    def _turn(self, half: int, part: Part, other: Part | None, sms: tuple[int, int]) -> Turn:
        """other: the part of the other half whose request may be in flight."""
        alone_s, (sum_s, _) = self._alone_s(half, part), self._sum(half, part, sms[SITES[part.site]])
        if self.cost.world_size == 1:  # nothing to send: the norm stays on the compute lane
            return alone_s + sum_s, alone_s + sum_s, 0.0
        if other is None:
            return alone_s, alone_s, sum_s
        beside = sms[SITES[other.site]]
        _, taken = self._sum(1 - half, other, beside)
        return alone_s, self._beside_s(half, part, beside, taken), sum_s

    def _alone_s(self, half: int, part: Part) -> float:
        return self._segment(half, part)[1]

    def _segment(self, half: int, part: Part) -> tuple[Segment, float]:
        """(what the part computes, seconds of it alone)."""
        known = self._segments.get((part, half))
        if known is None:
            segment = self.cost.segment(part, self.halves[half])
            known = self._segments[part, half] = segment, segment.seconds(self.cost.hardware.sms)
        return known

    def _beside_s(self, half: int, part: Part, sms: int, taken: float) -> float:
        """While a request of the other half takes `sms` SMs, and its share of the memory's bandwidth. Never faster."""
        segment, alone_s = self._segment(half, part)
        beside_s = segment.seconds(max(1, self.cost.hardware.sms - sms), taken)
        return beside_s if beside_s > alone_s else alone_s

    def _sum(self, half: int, part: Part, sms: int) -> tuple[float, float]:
        """(seconds of the request that ends `part`, the share of the memory's bandwidth that it takes meanwhile)."""
        rows = self.halves[half].going(part)
        if part.gathers:
            return self.cost.request_s(part, rows, "weave", sms), 0.0
        known = self._sums.get((rows, sms))  # whatever was computed before it
        if known is None:
            seconds = self.cost.request_s(part, rows, "weave", sms)
            known = self._sums[rows, sms] = seconds, self.cost.taken(rows, seconds) if rows else 0.0
        return known
