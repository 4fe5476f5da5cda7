"""Transports: how bytes move between ranks. Each collective returns the bytes that this rank sent."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Transport(Protocol):
    world_size: int

    def all_reduce(self, total: Tensor) -> int:
        """In place: `total` becomes the sum over ranks, bitwise the same on every rank."""

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        """out: this rank's rows, fp32 = sum over ranks, in rank order, of `partial[owners[rank]]`."""

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        """In place: every rank has filled its own `rows[owners[rank]]` and gets the others'."""

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        """outs[r] becomes rank r's `part`; parts may differ in width."""

    def close(self) -> None:
        """Let go of the group, so that it can end."""


class LocalTransport:
    """World size 1: nothing moves."""

    world_size = 1

    def all_reduce(self, total: Tensor) -> int:
        return 0

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        out.copy_(partial)
        return 0

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        return 0

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        outs[0].copy_(part)
        return 0

    def close(self) -> None: ...


class GlooTransport:
    """Point-to-point messages of row ranges, summed in rank order.

    gloo's own reduce_scatter_tensor is an all-reduce inside, and its all_gather refuses ragged parts; sending each
    owner its rows costs the line-rate minimum, 2 (W - 1) / W of the data, for any row count.
    """

    def __init__(self, rank: int, world_size: int, group: Any):
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self.peers = [peer for peer in range(world_size) if peer != rank]
        self._receive: dict[torch.dtype, Tensor] = {}

    def all_reduce(self, total: Tensor) -> int:
        if total.numel() == 0:
            return 0
        dist.all_reduce(total, group=self.group)
        return ring_all_reduce_bytes(total, self.world_size)

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        mine = owners[self.rank]
        received = self._buffer(partial, len(mine))
        incoming = [(peer, received[i]) for i, peer in enumerate(self.peers)]
        outgoing = [(peer, partial[owners[peer].start : owners[peer].stop]) for peer in self.peers]
        sent_bytes = self._exchange(incoming, outgoing)
        parts = dict(incoming) | {self.rank: partial[mine.start : mine.stop]}
        sum_in_rank_order([parts[rank] for rank in range(self.world_size)], out)
        return sent_bytes

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        mine = rows[owners[self.rank].start : owners[self.rank].stop]
        incoming = [(peer, rows[owners[peer].start : owners[peer].stop]) for peer in self.peers]
        return self._exchange(incoming, [(peer, mine) for peer in self.peers])

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        outs[self.rank].copy_(part)
        return self._exchange([(peer, outs[peer]) for peer in self.peers], [(peer, part) for peer in self.peers])

    def close(self) -> None:
        del self.group

    def _exchange(self, incoming: list[tuple[int, Tensor]], outgoing: list[tuple[int, Tensor]]) -> int:
        works = [dist.irecv(data, peer, group=self.group) for peer, data in incoming if data.numel()]
        works += [dist.isend(data, peer, group=self.group) for peer, data in outgoing if data.numel()]
        for work in works:
            assert work is not None  # only ranks outside the group get none
            work.wait()
        return sum(data.nbytes for _, data in outgoing)

    def _buffer(self, partial: Tensor, rows: int) -> Tensor:
        """[W - 1, rows, hidden] to receive into; grows to the largest size seen and is used again."""
        shape = (len(self.peers), rows, partial.shape[1])
        size = shape[0] * shape[1] * shape[2]
        held = self._receive.get(partial.dtype)
        if held is None or held.numel() < size:
            held = self._receive[partial.dtype] = partial.new_empty(size)
        return held[:size].view(shape)


class CollectiveTransport:
    """A backend with fast uniform collectives (NCCL). Ragged parts are padded in the communication buffer only."""

    def __init__(self, rank: int, world_size: int, group: Any):
        self.rank = rank
        self.world_size = world_size
        self.group = group

    def all_reduce(self, total: Tensor) -> int:
        if total.numel() == 0:
            return 0
        dist.all_reduce(total, group=self.group)
        return ring_all_reduce_bytes(total, self.world_size)

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        most = max(map(len, owners))
        if most == 0:
            return 0
        padded = partial.new_zeros(self.world_size, most, partial.shape[1])
        for rank, rows in enumerate(owners):
            padded[rank, : len(rows)] = partial[rows.start : rows.stop]
        mine = partial.new_empty(most, partial.shape[1])
        dist.reduce_scatter_tensor(mine, padded.view(-1, partial.shape[1]), group=self.group)
        out.copy_(mine[: len(owners[self.rank])])
        return mine.nbytes * (self.world_size - 1)

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        most = max(map(len, owners))
        if most == 0:
            return 0
        mine = rows.new_zeros(most, rows.shape[1])
        mine[: len(owners[self.rank])] = rows[owners[self.rank].start : owners[self.rank].stop]
        gathered = rows.new_empty(self.world_size, most, rows.shape[1])
        dist.all_gather_into_tensor(gathered.view(-1, rows.shape[1]), mine, group=self.group)
        for rank, owned in enumerate(owners):
            rows[owned.start : owned.stop] = gathered[rank, : len(owned)]
        return mine.nbytes * (self.world_size - 1)

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        most = max(out.shape[1] for out in outs)
        if part.shape[0] == 0:
            return 0
        padded = part.new_zeros(part.shape[0], most)
        padded[:, : part.shape[1]] = part
        gathered = part.new_empty(self.world_size, part.shape[0], most)
        dist.all_gather_into_tensor(gathered.view(-1, most), padded, group=self.group)
        for rank, out in enumerate(outs):
            out.copy_(gathered[rank, :, : out.shape[1]])
        return padded.nbytes * (self.world_size - 1)

    def close(self) -> None:
        del self.group


def sum_in_rank_order(parts: list[Tensor], out: Tensor) -> None:
    """out (fp32) = parts[0] + parts[1] + ..., each widened first, so that the order alone decides the rounding."""
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    torch.add(parts[0].to(out.dtype), parts[1].to(out.dtype), out=out)
    for part in parts[2:]:
        out.add_(part)


def ring_all_reduce_bytes(total: Tensor, world_size: int) -> int:
    """What one rank sends in a ring all-reduce: every element 2 (W - 1) / W times."""
    return total.nbytes * 2 * (world_size - 1) // world_size
