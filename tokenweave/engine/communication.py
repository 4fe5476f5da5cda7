"""Opening a rank's communication: how bytes move, and what forms the sums."""

from __future__ import annotations

import logging
from functools import partial

import torch

from tokenweave.comm.choice import Choice, choose, facts_of
from tokenweave.comm.communicator import Communicator
from tokenweave.comm.fused import FusedCommunicator, Wiring, one_shot_rows, report_memory
from tokenweave.comm.group import Ranks
from tokenweave.comm.link import PacedTransport
from tokenweave.comm.symmetric import Layout, open_symmetric
from tokenweave.comm.transport import CollectiveTransport, GlooTransport, LocalTransport, Transport
from tokenweave.config import EngineConfig

log = logging.getLogger(__name__)


def open_transport(config: EngineConfig, ranks: Ranks) -> Transport:
    """How this rank's bytes move: not at all, over gloo, or by NCCL's collectives; paced where a link is set."""
    if ranks.world_size == 1:
        return LocalTransport()
    if ranks.device.type == "cuda":
        if config.link is not None:
            raise ValueError("link paces the comm lane of a CPU; on CUDA leave it out")
        return CollectiveTransport(ranks.rank, ranks.world_size, ranks.comm)
    transport = GlooTransport(ranks.rank, ranks.world_size, ranks.comm)
    return PacedTransport(transport, config.link) if config.link is not None else transport


def open_communicator(
    config: EngineConfig, ranks: Ranks, transport: Transport, dtype: torch.dtype, hidden_size: int
) -> Communicator:
    """What the group has voted for, or been told. Collective. Raises ValueError for a `comm` that cannot be."""
    choice = choose(config.comm, ranks.gather(facts_of(ranks.device)), dtype, hidden_size)
    layout = Layout(config.max_num_batched_tokens, hidden_size, dtype)
    if choice.implementation != "sharded":
        try:
            with ranks.together("opening symmetric memory"):
                communicator: Communicator = FusedCommunicator(transport, wire(choice.implementation, ranks, layout))
            ranks.gather(None)  # no launch before every rank's signals are zero
        except RuntimeError as error:
            if config.comm != "auto":
                raise
            choice = Choice("sharded", f"no symmetric memory: {error}")
    if choice.implementation == "sharded":
        communicator = Communicator(
            transport, ranks.rank, config.max_num_batched_tokens, hidden_size, dtype, ranks.device
        )
    communicator.choice = choice
    if ranks.rank == 0:
        log.info("sums are formed by %s: %s", choice.implementation, choice.reason)
    return communicator


def wire(implementation: str, ranks: Ranks, layout: Layout) -> Wiring:
    from tokenweave.kernels.launcher import Launcher

    memory = open_symmetric(layout.total_bytes, ranks)
    if implementation == "multimem" and not memory.multicast:
        raise RuntimeError("torch gave no multicast address; use comm='peer'")
    for part in layout.signals(memory.local):
        part.zero_()
    torch.cuda.synchronize(ranks.device)
    launcher = Launcher(ranks.device, partial(ranks.gather, None))
    report = report_memory(ranks.device)
    few = one_shot_rows(ranks.world_size, layout.hidden_size * layout.dtype.itemsize)
    return Wiring(implementation, ranks.rank, layout, memory, report, launcher, ranks.timeout_s, few)
