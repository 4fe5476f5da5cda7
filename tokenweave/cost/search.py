"""The best woven choice for a batch: a short search over the cut and the SMs of each site."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tokenweave.cost.choice import Choice
from tokenweave.cost.step import Step

GRAIN = 64  # rows: a cut at a tile's edge, from either end, wastes none
FINE_CUTS = 128  # at most, from either end, are ranked by their GEMMs alone
REGIONS = 16  # the best of each of so many parts of the batch are ranked with attention and sums
FINALIST_PARTS = 12  # the best of those get SM counts of their own: six cuts where a layer has two parts, and so on
SLACK = 0.003  # of the time: what cannot gain more is not looked at


class Found(NamedTuple):
    """The woven choice with the least predicted time, that time, and how many choices were looked at: cuts ranked with
    attention and sums, and pairs of SM counts for each finalist."""

    choice: Choice
    seconds: float
    candidates: int


def best_weave(step: Step) -> Found | None:
    """The best way found to weave a step; None for one rank or fewer than two rows.

    Bounded for the sake of serving: a batch that was never seen before costs less than a millisecond, once the model's
    GEMMs are known for such row counts (Cost.warm_up).
    """
    if step.batch.rows < 2 or step.cost.world_size == 1:
        return None
    bounds = sorted((_bound_s(step, cut), cut) for cut in shortlist(step))
    counts = len(step.cost.hardware.communication_sms)
    best, looked = None, len(bounds)
    for bound_s, cut in bounds[: max(2, FINALIST_PARTS // len(step.cost.core.parts))]:
        if best is not None and bound_s >= (1.0 - SLACK) * best[0]:
            break
        found = (*step.woven(cut).best_sms(SLACK), cut)
        best, looked = found if best is None else min(best, found), looked + counts * counts
    assert best is not None
    choice = Choice("weave", best[3], best[1], best[2])
    return Found(choice, step.seconds(choice), looked)


def shortlist(step: Step) -> list[int]:
    """The middle, and from each region of the batch the cuts whose halves' GEMMs waste least in their waves: one at a
    tile's edge from the front, one from the end."""
    rows = step.batch.rows
    grain = GRAIN * max(1, -(-rows // (FINE_CUTS * GRAIN)))
    edges = range(grain, rows, grain)
    cuts = {middle(rows), *_best_of_regions(step, edges), *_best_of_regions(step, [rows - edge for edge in edges])}
    return sorted(cuts)


def middle(rows: int) -> int:
    """The tile's edge that is nearest to the middle, or the middle of few rows."""
    at_edge = round(rows / 2 / GRAIN) * GRAIN
    return at_edge if 0 < at_edge < rows else rows // 2


def _best_of_regions(step: Step, cuts: Iterable[int]) -> list[int]:
    """The best by GEMMs in each of REGIONS equal parts of the batch."""
    rows, gemms_s = step.batch.rows, step.cost.gemms_s
    best: dict[int, tuple[float, int]] = {}
    for cut in cuts:
        region, ranked = cut * REGIONS // rows, (gemms_s(cut) + gemms_s(rows - cut), cut)
        if region not in best or ranked < best[region]:
            best[region] = ranked
    return [cut for _, cut in best.values()]


def _bound_s(step: Step, cut: int) -> float:
    """What a round of the core takes at least: each segment alone, or the sum it runs beside at the best SM count."""
    cost, rows = step.cost, (cut, step.batch.rows - cut)
    sums_s = [cost.fused_s(count, None) for count in rows]
    attention = {window: sums.halves(cut) for window, sums in step.attention.items()}
    seconds = 0.0
    for part in cost.core.parts:
        for half in (0, 1):
            alone_s, sum_s = cost.rows_s(part, rows[half]), sums_s[1 - half]
            if part.attends:
                alone_s += attention[part.window][half].seconds(1.0, 0.0)
            seconds += alone_s if part.gathers or alone_s > sum_s else sum_s
    return seconds
