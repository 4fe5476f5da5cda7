"""Ranks as threads of one process, so that one GPU can play all of them: how they meet, and how they sum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from perf.virtual import VirtualRanks
from tokenweave.comm.communicator import Communicator
from tokenweave.comm.fused import FusedCommunicator
from tokenweave.comm.group import Ranks
from tokenweave.comm.symmetric import Layout
from tokenweave.comm.transport import Transport, ring_all_reduce_bytes, sum_in_rank_order
from tokenweave.engine.runner import Runner
from tokenweave.kernels.fused import Geometry, Launch, Variant

MASK = (1 << 64) - 1  # strides are unsigned, and wrap


class Meeting:
    """Where the threads of one kind (one of each rank) exchange values, all in the same order. Bounded.

    baton: held by the one thread that runs, and passed on here alone: compilers that are not made for threads are then
    called by one at a time. Not where a rank has a comm lane of its own thread (a CPU).
    """

    def __init__(self, world_size: int, timeout_s: float, baton: threading.Lock | None = None):
        self.world_size = world_size
        self.baton = baton
        self.values: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=timeout_s)

    def gather(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Raises BrokenBarrierError where a rank stays away or has failed."""
        self.values[rank] = value
        with self._resting():
            self.barrier.wait()
        found = list(self.values)
        with self._resting():
            self.barrier.wait()
        return found

    @contextmanager
    def _resting(self) -> Iterator[None]:
        if self.baton is None:
            yield
            return
        self.baton.release()
        try:
            yield
        finally:
            self.baton.acquire()

    def leave(self) -> None:
        """Nobody waits for this rank any more."""
        self.barrier.abort()


class ThreadRanks(Ranks):
    """A rank that is a thread."""

    def __init__(self, rank: int, meeting: Meeting, device: torch.device, timeout_s: float):
        super().__init__(rank, meeting.world_size, device, timeout_s, None, None)
        self.meeting = meeting

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.rank, value)

    def leave(self) -> None: ...


class ThreadTransport(Transport):
    """Sums and gathers that read the other threads' tensors. On CUDA streams wait for each other by events."""

    def __init__(self, rank: int, meeting: Meeting, device: torch.device):
        self.rank, self.meeting, self.device = rank, meeting, device
        self.world_size = meeting.world_size

    def all_reduce(self, total: Tensor) -> int:
        with self._parts(total) as parts:
            out = torch.empty_like(total, dtype=torch.float32)
            sum_in_rank_order(parts, out)
        total.copy_(out)
        return ring_all_reduce_bytes(total, self.world_size)

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        mine = owners[self.rank]
        with self._parts(partial) as parts:
            sum_in_rank_order([part[mine.start : mine.stop] for part in parts], out)
        return (len(partial) - len(mine)) * partial.shape[1] * partial.itemsize

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        with self._parts(rows) as parts:
            for rank, owned in enumerate(owners):
                if rank != self.rank:
                    rows[owned.start : owned.stop] = parts[rank][owned.start : owned.stop]
        return len(owners[self.rank]) * rows.shape[1] * rows.itemsize * (self.world_size - 1)

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        with self._parts(part) as parts:
            for out, theirs in zip(outs, parts, strict=True):
                out.copy_(theirs)
        return part.nbytes * (self.world_size - 1)

    def close(self) -> None: ...

    @contextmanager
    def _parts(self, tensor: Tensor) -> Iterator[list[Tensor]]:
        """Every rank's tensor, to be read; nobody writes to its own before all have read."""
        parts = meet_on_streams(self.rank, self.meeting, self.device, tensor)
        yield parts
        meet_on_streams(self.rank, self.meeting, self.device, None)


def meet_on_streams(rank: int, meeting: Meeting, device: torch.device, value: Any) -> list[Any]:
    """Every rank's value; on CUDA this thread's stream goes on after all that every rank has queued so far."""
    met = meeting.gather(rank, (value, recorded(device)))
    for _, event in met:
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
    return [each for each, _ in met]


def recorded(device: torch.device) -> Any:
    """An event behind all that is queued on the current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class JointKernels:
    """The fused kernel for a rank that is a thread: when all ranks have come with a launch, rank 0 launches once for
    all of them, cooperatively. So no kernel ever waits on the GPU for one that is not there."""

    def __init__(self, rank: int, meeting: Meeting, virtual: VirtualRanks):
        self.rank, self.meeting, self.virtual = rank, meeting, virtual
        self.launches = 0

    def geometry(self, variant: Variant) -> Geometry:
        return self.virtual.launcher.geometry(variant)

    def launch(self, variant: Variant, launch: Launch, num_sms: int) -> None:
        launches = meet_on_streams(self.rank, self.meeting, self.virtual.device, launch)
        if self.rank == 0:
            self.virtual.launch(variant, joined(launches), num_sms)
        meet_on_streams(self.rank, self.meeting, self.virtual.device, None)
        self.launches += 1


def joined(launches: list[Launch]) -> Launch:
    """Rank 0's launch, for all ranks: what is a rank's own lies at one stride from rank to rank."""
    first = launches[0]
    strides = {
        (getattr(launch, name) - getattr(first, name)) // rank & MASK
        for rank, launch in enumerate(launches)
        for name in ("residual_in", "residual_out")
        if rank and getattr(first, name)
    }
    if len(strides) != 1:
        raise ValueError(f"the ranks' residuals lie at {len(strides)} strides, expected one; make them in rank order")
    (first.residual_stride,) = strides
    return first


def fused_communicators(layout: Layout, device: torch.device, meeting: Meeting, timeout_s: float) -> list[Any]:
    """One for each virtual rank of a GPU, by the `peer` kernel."""
    virtual = VirtualRanks(meeting.world_size, layout, device, timeout_s, residual_rows=1)
    found = []
    for rank, wiring in enumerate(virtual.wirings):
        transport = ThreadTransport(rank, meeting, device)
        found.append(FusedCommunicator(transport, replace(wiring, kernels=JointKernels(rank, meeting, virtual))))
    return found


def plain_communicators(layout: Layout, device: torch.device, meeting: Meeting, timeout_s: float) -> list[Any]:
    """The same without the kernel, for a CPU: sharded sums."""
    return [
        Communicator(
            ThreadTransport(rank, meeting, device), rank, layout.max_rows, layout.hidden_size, layout.dtype, device
        )
        for rank in range(meeting.world_size)
    ]


def on_threads(world_size: int, device: torch.device, meetings: list[Meeting], run: Callable[[int], Any]) -> list[Any]:
    """run(rank) on a thread for each rank, with a stream of its own; results in rank order. The first error is raised,
    and frees the others."""

    def guarded(rank: int) -> Any:
        try:
            with meetings[0].baton or nullcontext():
                if device.type != "cuda":
                    return run(rank)
                torch.cuda.set_device(device)
                with torch.cuda.stream(torch.cuda.Stream(device)):
                    return run(rank)
        except BaseException:
            for meeting in meetings:
                meeting.leave()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(world_size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]


def close_all(runners: list[Runner]) -> None:
    for runner in runners:
        runner.close()
