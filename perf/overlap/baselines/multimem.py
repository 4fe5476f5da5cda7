"""Baseline: torch's all-reduce through NVLink multicast, in symmetric memory."""

from __future__ import annotations

import torch
from torch import Tensor

from perf.overlap.baselines.channel import BaselineCommunicator, PlainChannel
from tokenweave.comm.choice import facts_of, no_multimem
from tokenweave.comm.communicator import Buffers
from tokenweave.comm.transport import ring_all_reduce_bytes
from tokenweave.engine.rank import Rank


class Multimem:
    name = "multimem"

    def missing(self, rank: Rank) -> str:
        if rank.ranks.device.type != "cuda":
            return "it needs CUDA"
        return no_multimem(
            rank.ranks.gather(facts_of(rank.ranks.device)), rank.runner.dtype, rank.runner.spec.hidden_size
        )

    def open(self, rank: Rank) -> MultimemCommunicator:
        return MultimemCommunicator(rank)


class MultimemCommunicator(BaselineCommunicator):
    """Sums in place, in symmetric memory. `off` has one half, and the form one channel at a time."""

    def __init__(self, rank: Rank):
        from torch._C._distributed_c10d import _SymmetricMemory  # as in comm/symmetric.py: an allocation of its own
        from torch.distributed import _symmetric_memory as symmetric

        super().__init__(rank, PlainChannel)
        self.group_name = str(rank.ranks.control.group_name)
        buffers: Buffers = self._make()
        shape, dtype = tuple(buffers.partial.shape), buffers.partial.dtype
        buffers.partial = _SymmetricMemory.empty_strided_p2p(shape, (shape[1], 1), dtype, rank.ranks.device)
        symmetric.rendezvous(buffers.partial, rank.ranks.control)
        self._halves = [buffers]

    def all_reduce(self, total: Tensor) -> int:
        if total.numel():
            torch.ops.symm_mem.multimem_all_reduce_(total, "sum", self.group_name)
        return ring_all_reduce_bytes(total, self.transport.world_size)
