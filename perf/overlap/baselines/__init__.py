"""Baselines: what forms the sums of `off` on GPUs without tokenweave, each with a fused residual and RMSNorm.

The fastest one at a point is its `off`. Add one: a file with a Baseline, and its name here.
"""

from __future__ import annotations

from typing import Protocol

from perf.overlap.baselines.flashinfer import FlashInfer
from perf.overlap.baselines.multimem import Multimem
from perf.overlap.baselines.nccl import Nccl
from tokenweave.comm.communicator import Communicator
from tokenweave.engine.rank import Rank


class Baseline(Protocol):
    name: str

    def missing(self, rank: Rank) -> str:
        """Why it cannot take part here; "" if it can."""

    def open(self, rank: Rank) -> Communicator:
        """What opens channels of the form "reference" with such sums. Collective."""


BASELINES: tuple[Baseline, ...] = (Nccl(), Multimem(), FlashInfer())


def open_baselines(rank: Rank) -> tuple[dict[str, Communicator], dict[str, str]]:
    """(what can form sums, by name; why the others cannot). Collective: one that fails on a rank is missing on all."""
    usable: dict[str, Communicator] = {}
    missing: dict[str, str] = {}
    for baseline in BASELINES:
        reasons = rank.ranks.gather(baseline.missing(rank))
        if any(reasons):
            missing[baseline.name] = next(filter(None, reasons))
            continue
        try:
            with rank.ranks.together(f"opening {baseline.name}"):
                usable[baseline.name] = baseline.open(rank)
        except Exception as error:  # a guest, of any version: listed as missing, with what it said, and the run goes on
            missing[baseline.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return usable, missing
