"""The best woven choice for a batch: a short search over the cut and the SMs of each site."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import ROUGH_SMS, Cost, usual_sms
from tokenweave.cost.step import Step
from tokenweave.cost.work import Work
from tokenweave.cost.woven import Woven

GRAIN = 64  # rows: a cut at a tile's edge, from either end, wastes none
MOST_EDGES = 128  # cuts at tiles' edges, from either end
EVEN_CUTS = 128  # of a batch with fewer edges than that: its even parts as well
FINALISTS = 64  # cuts that are looked at with every SM count


class Found(NamedTuple):
    """The woven choice with the least predicted time, that time, and how many choices were looked at: cuts ranked
    with a few SM counts, and all pairs of SM counts for each finalist."""

    choice: Choice
    seconds: float
    candidates: int


def best_weave(step: Step) -> Found | None:
    """The best way found to weave a step; None for one rank or fewer than two rows."""
    if step.batch.rows < 2 or step.cost.world_size == 1:
        return None
    cuts, counts = all_cuts(step.batch.rows), usual_sms(step.cost.hardware)
    halves = step.halves(cuts)
    kept = shortlist(step.cost, halves)
    woven = Woven(step.cost, halves.select(kept), counts)
    at = int(woven.best_s().argmin())
    attention, mlp = woven.best_counts(at)
    choice = Choice("weave", int(cuts[kept[at]]), counts[attention], counts[mlp])
    ranked = len(cuts) * len(ROUGH_SMS) ** 2 if len(kept) < len(cuts) else 0
    return Found(choice, step.know(choice, woven.device_s(at, attention, mlp)), ranked + len(kept) * len(counts) ** 2)


def all_cuts(rows: int) -> np.ndarray:
    """Tiles' edges from either end of the batch, of a short one even parts, too, and the middle; in order."""
    grain = GRAIN * max(1, -(-rows // (MOST_EDGES * GRAIN)))
    edges = np.arange(grain, rows, grain)
    even = np.arange(1, EVEN_CUTS if len(edges) < EVEN_CUTS // 4 else 1) * rows // EVEN_CUTS
    is_cut = np.zeros(rows, dtype=bool)
    is_cut[edges] = is_cut[rows - edges] = is_cut[even] = is_cut[middle(rows)] = True
    is_cut[0] = False
    return is_cut.nonzero()[0]


def middle(rows: int) -> int:
    """The tile's edge that is nearest to the middle, or the middle of few rows."""
    at_edge = round(rows / 2 / GRAIN) * GRAIN
    return at_edge if 0 < at_edge < rows else rows // 2


def shortlist(cost: Cost, halves: Work) -> np.ndarray:
    """The indices of the cuts that are fastest as far as tables tell."""
    count = halves.rows.shape[1]
    if count <= FINALISTS:
        return np.arange(count)
    ranked_s = Woven(cost, halves, ROUGH_SMS, rough=True).best_s()
    return np.sort(np.argpartition(ranked_s, FINALISTS)[:FINALISTS])
