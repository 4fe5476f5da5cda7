"""Opening a rank's communication: how bytes move, and what forms the sums."""

from __future__ import annotations

import logging

import torch

from tokenweave.comm.choice import Choice, Facts, choose, facts_of
from tokenweave.comm.communicator import Communicator
from tokenweave.comm.fused import FusedCommunicator, Wiring, one_shot_rows, report_memory
from tokenweave.comm.group import Ranks, is_lost_peer
from tokenweave.comm.link import PacedTransport
from tokenweave.comm.symmetric import Layout, SymmetricMemory, allocate, exchange
from tokenweave.comm.transport import CollectiveTransport, GlooTransport, LocalTransport, Transport
from tokenweave.config import EngineConfig
from tokenweave.kernels.fused import shared_bytes_of
from tokenweave.waiting import within

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
    with ranks.together("looking at this rank's device"):
        mine = facts_of(ranks.device, alone=ranks.world_size == 1)
    facts = ranks.gather(mine)
    choice = choose(config.comm, facts, dtype, hidden_size)
    communicator: Communicator | None = None
    if choice.implementation != "sharded":
        try:
            layout = Layout(config.max_num_batched_tokens, hidden_size, dtype)
            communicator, choice = open_fused(config.comm, choice, facts, ranks, transport, layout)
        except (RuntimeError, ImportError) as error:  # of torch, whose symmetric memory is young
            if config.comm != "auto" or is_lost_peer(error):
                raise
            choice = Choice("sharded", f"no symmetric memory: {error}")
    if communicator is None:
        most_rows = config.max_num_batched_tokens
        communicator = Communicator(transport, ranks.rank, most_rows, hidden_size, dtype, ranks.device)
    communicator.choice = choice
    if ranks.rank == 0:
        log.info("sums are formed by %s: %s", choice.implementation, choice.reason)
    return communicator


def open_fused(
    asked: str, choice: Choice, facts: list[Facts], ranks: Ranks, transport: Transport, layout: Layout
) -> tuple[FusedCommunicator, Choice]:
    """The communicator over symmetric memory, and the choice, which is `peer` where torch gave no multicast address."""
    with ranks.together("allocating symmetric memory"):
        local = allocate(layout.total_bytes, ranks.device)
    with ranks.together("exchanging the addresses of symmetric memory"):
        memory = exchange(local, ranks)
    if choice.implementation == "multimem" and not all(ranks.gather(bool(memory.multicast))):
        reason = "torch gave no multicast address on every rank"
        if asked == "multimem":
            raise ValueError(f"comm='multimem' cannot be: {reason}; use comm='auto'")
        choice = Choice("peer", reason)
    with ranks.together("starting the fused kernel"):
        communicator = FusedCommunicator(transport, wire(choice.implementation, facts, ranks, layout, memory))
    ranks.gather(None)  # no launch before every rank's signals are zero
    return communicator, choice


def wire(implementation: str, facts: list[Facts], ranks: Ranks, layout: Layout, memory: SymmetricMemory) -> Wiring:
    from tokenweave.kernels.launcher import Launcher

    for part in layout.signals(memory.local):
        part.zero_()
    within(ranks.timeout_s, lambda: torch.cuda.synchronize(ranks.device), "this rank's GPU")
    launcher = Launcher(ranks.device, ranks.together, min(shared_bytes_of(each.capability) for each in facts))
    report = report_memory(ranks.device)
    few = one_shot_rows(ranks.world_size, layout.hidden_size * layout.dtype.itemsize)
    return Wiring(implementation, ranks.rank, layout, memory, report, launcher, ranks.timeout_s, few)
