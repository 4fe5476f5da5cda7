"""Transports that only perf/ can select: one that sends nothing, and one that notes what a step would send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenweave.comm.transport import Finish, Transport, ring_all_reduce_bytes


class SilentTransport(Transport):
    """Says what it would send, and sends nothing: results are wrong by design."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size

    def all_reduce(self, total: Tensor) -> int:
        return ring_all_reduce_bytes(total, self.world_size)

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        mine = owners[self.rank]
        out.copy_(partial[mine.start : mine.stop])
        return partial.nbytes * (self.world_size - 1) // self.world_size

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        return rows.nbytes * (self.world_size - 1) // self.world_size

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        for out in outs:
            out.zero_()
        return part.nbytes * (self.world_size - 1)

    def close(self) -> None: ...


class NotingTransport(SilentTransport):
    """Notes a step's collectives, to be run again without the step: communication alone."""

    def __init__(self, rank: int, world_size: int):
        super().__init__(rank, world_size)
        self.noted: list[Callable[[Transport], int]] = []
        self._buffers: dict[Any, Tensor] = {}

    def all_reduce(self, total: Tensor) -> int:
        buffer = self._like(total)
        self.noted.append(lambda transport: transport.all_reduce(buffer))
        return super().all_reduce(total)

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        buffers = self._like(partial), list(owners), self._like(out)
        self.noted.append(lambda transport: transport.reduce_scatter(*buffers))
        return super().reduce_scatter(partial, owners, out)

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        buffers = self._like(rows), list(owners)
        self.noted.append(lambda transport: transport.all_gather_rows(*buffers))
        return super().all_gather_rows(rows, owners)

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        buffers = self._like(part), [self._like(out, i) for i, out in enumerate(outs)]
        self.noted.append(lambda transport: transport.all_gather_columns(*buffers))
        return super().all_gather_columns(part, outs)

    def sum_rows(self, partial: Tensor, owners: list[range], total: Tensor, finish: Finish, out: Tensor) -> int:
        buffers = self._like(partial), list(owners), self._like(total), nothing, self._like(out)
        self.noted.append(lambda transport: transport.sum_rows(*buffers))
        finish(range(len(total)))
        return super().reduce_scatter(partial, owners, total) + super().all_gather_rows(out, owners)

    @torch.inference_mode()  # as were its buffers made
    def replay(self, transport: Transport) -> int:
        """All that was noted, in order. Returns the bytes that this rank sent."""
        return sum(collective(transport) for collective in self.noted)

    def _like(self, tensor: Tensor, copy: int = -1) -> Tensor:
        """A zeroed tensor of that shape, the same one each time, so that a step's worth of them stays small."""
        key = tuple(tensor.shape), tensor.dtype, copy
        return self._buffers.setdefault(key, torch.zeros_like(tensor))


def nothing(rows: range) -> None:
    """What is done with the rows of a sum."""


def note(rank: int, world_size: int, run: Callable[[Transport], Any]) -> Callable[[Transport], int]:
    """Let `run` make one step over a transport that notes, and return what repeats its communication alone."""
    noting = NotingTransport(rank, world_size)
    run(noting)
    return noting.replay
