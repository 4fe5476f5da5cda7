"""Transports: how bytes move between ranks. Each collective returns the bytes that this rank sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 warns of the names that 2.11 and 2.12 have alone.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

PIECE_BYTES = 64 << 10  # a rank's rows go in two pieces from twice this on: a smaller message costs more than it hides

Finish = Callable[[range], None]  # what is done with this rank's rows of a sum, counted from its first one


class Transport(Protocol):
    rank: int
    world_size: int

    def all_reduce(self, total: Tensor) -> int:
        """In place: `total` becomes the sum over ranks, bitwise the same on every rank."""

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        """out: this rank's rows, fp32 = sum over ranks, in rank order, of `partial[owners[rank]]`."""

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        """In place: every rank has filled its own `rows[owners[rank]]` and gets the others'."""

    def sum_rows(self, partial: Tensor, owners: list[range], total: Tensor, finish: Finish, out: Tensor) -> int:
        """reduce_scatter of `partial` into `total`, finish(rows), which fills this rank's rows of `out` from it, and
        all_gather_rows of `out`. `finish` may be called for one part of the rows after another."""
        sent_bytes = self.reduce_scatter(partial, owners, total)
        finish(range(len(owners[self.rank])))
        return sent_bytes + self.all_gather_rows(out, owners)

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        """outs[r] becomes rank r's `part`; parts may differ in width."""

    def close(self) -> None:
        """Let go of the group, so that it can end."""


class LocalTransport(Transport):
    """World size 1: nothing moves."""

    rank, world_size = 0, 1

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


@dataclass(frozen=True)
class Message:
    """One on its way; without rows there is nothing to wait for. sent_bytes: 0 for one to receive."""

    work: Any
    sent_bytes: int = 0


def wait(messages: list[Message]) -> int:
    """Until all have arrived or left; the group's timeout bounds it. Returns the bytes sent."""
    for message in messages:
        if message.work is not None:
            message.work.wait()
    return sum(message.sent_bytes for message in messages)


class GlooTransport(Transport):
    """Point-to-point messages of row ranges, summed in rank order.

    gloo's own reduce_scatter_tensor is an all-reduce inside, and its all_gather refuses ragged parts; sending each
    owner its rows costs the line-rate minimum, 2 (W - 1) / W of the data, for any row count.
    """

    def __init__(self, rank: int, world_size: int, group: Any):
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self.peers = [peer for peer in range(world_size) if peer != rank]
        self._buffers: dict[torch.dtype, Tensor] = {}

    def all_reduce(self, total: Tensor) -> int:
        if total.numel() == 0:
            return 0
        dist.all_reduce(total, group=self.group)
        return ring_all_reduce_bytes(total, self.world_size)

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        mine = owners[self.rank]
        received = self._buffer(partial, len(mine))
        sent_bytes = wait(self._receive_into(received) + self._send(partial, owners))
        self._sum(partial[mine.start : mine.stop], received, out)
        return sent_bytes

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        return wait(self._receive_rows(rows, owners) + self._send_mine(rows, owners))

    def sum_rows(self, partial: Tensor, owners: list[range], total: Tensor, finish: Finish, out: Tensor) -> int:
        """In two pieces where they are large enough: while one is summed and finished, the other is on the wire."""
        mine, received = owners[self.rank], self._buffer(partial, len(owners[self.rank]))
        pieces = in_two(owners) if min(map(len, owners)) * partial[:1].nbytes >= 2 * PIECE_BYTES else [owners]
        within = [slice(piece[self.rank].start - mine.start, piece[self.rank].stop - mine.start) for piece in pieces]
        # All that is to come is asked for at once: a sender whose receiver is not ready has to wait for its word.
        scattered = [self._receive_into(received[:, rows]) for rows in within]
        gathered = [self._receive_rows(out, piece) for piece in pieces]
        sent = [self._send(partial, piece) for piece in pieces]
        for piece, rows, arriving in zip(pieces, within, scattered):
            wait(arriving)
            self._sum(partial[mine.start : mine.stop][rows], received[:, rows], total[rows])
            finish(range(rows.start, rows.stop))
            sent.append(self._send_mine(out, piece))
        return sum(map(wait, (*gathered, *sent)))

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        outs[self.rank].copy_(part)
        arriving = [self._receive(outs[peer], peer) for peer in self.peers]
        return wait(arriving + [self._send_to(peer, part) for peer in self.peers])

    def close(self) -> None:
        del self.group

    def _sum(self, mine: Tensor, received: Tensor, out: Tensor) -> None:
        parts = dict(zip(self.peers, received)) | {self.rank: mine}
        sum_in_rank_order([parts[rank] for rank in range(self.world_size)], out)

    def _send(self, partial: Tensor, owners: list[range]) -> list[Message]:
        """To every peer the rows that it owns."""
        return [self._send_to(peer, partial[owners[peer].start : owners[peer].stop]) for peer in self.peers]

    def _receive_into(self, received: Tensor) -> list[Message]:
        return [self._receive(data, peer) for peer, data in zip(self.peers, received)]

    def _send_mine(self, rows: Tensor, owners: list[range]) -> list[Message]:
        mine = owners[self.rank]
        return [self._send_to(peer, rows[mine.start : mine.stop]) for peer in self.peers]

    def _receive_rows(self, rows: Tensor, owners: list[range]) -> list[Message]:
        return [self._receive(rows[owners[peer].start : owners[peer].stop], peer) for peer in self.peers]

    def _send_to(self, peer: int, data: Tensor) -> Message:
        work = dist.isend(data, peer, group=self.group) if data.numel() else None
        return Message(work, data.nbytes)

    def _receive(self, data: Tensor, peer: int) -> Message:
        return Message(dist.irecv(data, peer, group=self.group) if data.numel() else None)

    def _buffer(self, partial: Tensor, rows: int) -> Tensor:
        """[W - 1, rows, hidden] to receive into; grows to the largest size seen and is used again."""
        shape = (len(self.peers), rows, partial.shape[1])
        size = shape[0] * shape[1] * shape[2]
        held = self._buffers.get(partial.dtype)
        if held is None or held.numel() < size:
            held = self._buffers[partial.dtype] = partial.new_empty(size)
        return held[:size].view(shape)


class Scratch:
    """Memory for what a collective needs beside its arguments, kept from call to call: the comm lane allocates nothing.

    What is outgrown is kept as well, since a captured CUDA graph may use it.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], list[Tensor]] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Uninitialised, of `like`'s dtype and device. Calls with one name share memory."""
        held, size = self._held.setdefault((name, like.dtype), []), math.prod(shape)
        if not held or held[-1].numel() < size:
            held.append(like.new_empty(max(size, 2 * held[-1].numel() if held else 0)))
        return held[-1][:size].view(shape)


class CollectiveTransport(Transport):
    """A backend with fast uniform collectives (NCCL). Ragged parts are padded in the communication buffer only; what
    the padding holds is sent and never read."""

    def __init__(self, rank: int, world_size: int, group: Any):
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self.scratch = Scratch()

    def all_reduce(self, total: Tensor) -> int:
        if total.numel() == 0:
            return 0
        dist.all_reduce(total, group=self.group)
        return ring_all_reduce_bytes(total, self.world_size)

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        most = max(map(len, owners))
        if most == 0:
            return 0
        padded = partial if even(owners) else self._padded(partial, owners, most)
        mine = self.scratch("mine", partial, most, partial.shape[1])
        reduce_scatter(mine, padded, group=self.group)
        out.copy_(mine[: len(owners[self.rank])])
        return mine.nbytes * (self.world_size - 1)

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        most, own = max(map(len, owners)), owners[self.rank]
        if most == 0:
            return 0
        if even(owners):
            mine = rows[own.start : own.stop]
            all_gather(rows, mine, group=self.group)
            return mine.nbytes * (self.world_size - 1)
        mine = self.scratch("mine", rows, most, rows.shape[1])
        mine[: len(own)] = rows[own.start : own.stop]
        gathered = self.scratch("all", rows, self.world_size * most, rows.shape[1])
        all_gather(gathered, mine, group=self.group)
        for rank, owned in enumerate(owners):
            rows[owned.start : owned.stop] = gathered[rank * most : rank * most + len(owned)]
        return mine.nbytes * (self.world_size - 1)

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        most = max(out.shape[1] for out in outs)
        if part.shape[0] == 0:
            return 0
        padded = self.scratch("mine", part, part.shape[0], most)
        padded[:, : part.shape[1]] = part
        gathered = self.scratch("all", part, self.world_size, part.shape[0], most)
        all_gather(gathered.view(-1, most), padded, group=self.group)
        for rank, out in enumerate(outs):
            out.copy_(gathered[rank, :, : out.shape[1]])
        return padded.nbytes * (self.world_size - 1)

    def close(self) -> None:
        del self.group

    def _padded(self, partial: Tensor, owners: list[range], most: int) -> Tensor:
        padded = self.scratch("all", partial, self.world_size * most, partial.shape[1])
        for rank, rows in enumerate(owners):
            padded[rank * most : rank * most + len(rows)] = partial[rows.start : rows.stop]
        return padded


def even(owners: list[range]) -> bool:
    """Whether all ranks own as many rows, so that nothing has to be padded."""
    return len({len(owned) for owned in owners}) == 1


def in_two(owners: list[range]) -> list[list[range]]:
    """The first half of every owner's rows, and the second."""
    middles = [owned.start + len(owned) // 2 for owned in owners]
    first = [range(owned.start, middle) for owned, middle in zip(owners, middles)]
    return [first, [range(middle, owned.stop) for owned, middle in zip(owners, middles)]]


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
