"""The best woven choice for a batch: a short search over the cut and the SMs of each site."""

from __future__ import annotations

from tokenweave.cost.choice import Choice
from tokenweave.cost.step import Step

CUT_GRAIN = 128  # rows: a cut at a tile's edge wastes none
CUTS = 32  # so many, at most, are ranked by the waves of their GEMMs
SHORTLIST = 6  # of those are laid out
FINALISTS = 3  # of those get their own SM counts
FIRST_SMS = 8  # at both sites, to begin with


def best_weave(step: Step) -> tuple[Choice, float] | None:
    """(the woven choice with the least predicted time, that time); None for one rank or fewer than two rows."""
    if step.batch.rows < 2 or step.cost.world_size == 1:
        return None
    sms = min(step.cost.hardware.communication_sms, key=lambda count: abs(count - FIRST_SMS))
    first = (sms, sms)
    listed = sorted((step.woven(cut).core_s(*first), cut) for cut in shortlist(step))
    choices = [_climbed(step, cut, core_s, first) for core_s, cut in listed[:FINALISTS]]
    return min(((choice, step.seconds(choice)) for choice in choices), key=lambda timed: timed[1])


def shortlist(step: Step) -> list[int]:
    """The middle, and the cuts between a quarter and three quarters whose halves' GEMMs waste least in their waves."""
    rows = step.batch.rows
    grain = CUT_GRAIN * max(1, -(-rows // (2 * CUTS * CUT_GRAIN)))
    middle = aligned(rows // 2, rows)
    cuts = range(-(-rows // 4 // grain) * grain, rows * 3 // 4 + 1, grain)
    ranked = sorted((cut for cut in cuts if 0 < cut < rows and cut != middle), key=lambda cut: _gemms_s(step, cut))
    return [middle, *ranked[: SHORTLIST - 1]]


def aligned(cut: int, rows: int) -> int:
    """The nearest multiple of the grain that leaves rows on both sides, or `cut` itself."""
    at_edge = round(cut / CUT_GRAIN) * CUT_GRAIN
    return at_edge if 0 < at_edge < rows else cut


def _gemms_s(step: Step, cut: int) -> float:
    sms, rows = step.cost.hardware.sms, step.batch.rows
    gemms = [gemm for part in step.cost.core.parts for gemm in (*part.gemms, *part.live_gemms)]
    return sum(gemm.compute_s(cut, sms) + gemm.compute_s(rows - cut, sms) for gemm in gemms)


def _climbed(step: Step, cut: int, best_s: float, start: tuple[int, int]) -> Choice:
    """The SM counts for a cut: of each site in turn, more while that helps, or else fewer."""
    woven, best = step.woven(cut), list(start)
    for site in (0, 1, 0):
        counts = step.cost.hardware.communication_sms
        at = counts.index(best[site])
        for direction in (counts[at + 1 :], counts[:at][::-1]):
            for count in direction:
                tried = [*best[:site], count, *best[site + 1 :]]
                tried_s = woven.core_s(*tried)
                if tried_s >= best_s:
                    break
                best, best_s = tried, tried_s
    return Choice("weave", cut, *best)
