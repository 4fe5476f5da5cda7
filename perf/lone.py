"""A runner that is opened by hand: one rank among ranks that are no processes, with a communicator that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokenweave.comm.communicator import Communicator
from tokenweave.comm.group import Ranks
from tokenweave.config import EngineConfig
from tokenweave.engine.allocation import allocate_cache
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.rank import find_model
from tokenweave.engine.runner import Runner
from tokenweave.models.registry import read_config


class LoneRanks(Ranks):
    """Rank `rank` of `world_size`, of which there is no other: they are taken to report what this one does."""

    def __init__(self, rank: int, world_size: int, device: torch.device, timeout_s: float):
        super().__init__(rank, world_size, device, timeout_s, None, None)

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def send(self, message: Any) -> None: ...

    def leave(self) -> None: ...


def open_runner(config: EngineConfig, ranks: Ranks, connect: Callable[[Runner], Communicator]) -> Runner:
    """What tokenweave.engine.rank.load_rank does, but for the vote: `connect` makes the communicator."""
    folder = find_model(config)
    runner = Runner(config, ranks, folder, read_config(folder))
    runner.communicator = connect(runner)
    allocate_cache(runner)
    return runner


def prompt_batch(ids: list[int], block_size: int) -> Batch:
    """A prompt in the cache's first blocks; its last token makes logits."""
    blocks = tuple(range(-(-len(ids) // block_size)))
    return Batch((Span(tuple(ids), 0, blocks, prompt_len=len(ids), wanted=1),))
