"""Baseline: torch.distributed's all-reduce (NCCL on GPUs)."""

from __future__ import annotations

from perf.overlap.baselines.channel import BaselineCommunicator, PlainChannel
from tokenweave.engine.rank import Rank


class Nccl:
    name = "NCCL"

    def missing(self, rank: Rank) -> str:
        return "" if rank.ranks.world_size > 1 else "one rank has nothing to sum"

    def open(self, rank: Rank) -> BaselineCommunicator:
        return BaselineCommunicator(rank, PlainChannel)
