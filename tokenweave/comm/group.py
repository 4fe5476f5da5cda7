"""Ranks: who takes part, and the process groups they talk through."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tokenweave.waiting import EXIT_S, ending_within, within

log = logging.getLogger(__name__)
SIZE_BYTES = 8  # of a control message's size, which comes before it
PIECE_BYTES = (4096, 65536)  # the least and the most of a control message that travel in its first piece
BUSY_S = 1.0  # between two words of a busy rank
NCCL_CLOSE_S = 10.0
SHARED = "every rank raises this"  # in the notes of an error that all ranks know of
WORKERS = "tokenweave workers"  # what the default group is called that an LLM makes with the ranks that it started


class PeerError(RuntimeError):
    """Another rank failed; its message names the rank and what it reported."""


@dataclass(eq=False)
class Ranks:
    """One rank's view of the tensor-parallel group.

    control: a gloo group for small messages of the main thread. comm: the group of the comm lane alone, because two
    threads that share one group can exchange each other's messages. Both are None at world size 1.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float
    control: Any
    comm: Any
    watch: Callable[[], None] | None = None  # raises where a rank is known to have ended; does not wait
    _room: int = PIECE_BYTES[0]  # of the next control message's first piece; sender and receiver see it change alike

    def send(self, message: Any) -> None:
        """Rank 0: hand one picklable message to every other rank, in order."""
        if self.world_size == 1:
            return
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        sized = len(payload).to_bytes(SIZE_BYTES, "little") + payload
        pieces = [sized[: self._room].ljust(self._room, b"\0"), sized[self._room :]]
        tensors = [torch.frombuffer(bytearray(piece), dtype=torch.uint8) for piece in pieces if piece]
        peers = range(1, self.world_size)
        for work in [self.control.send([tensor], peer, 0) for tensor in tensors for peer in peers]:
            work.wait()
        self._room = room_after(len(sized))

    def receive(self) -> Any:
        """Every other rank: the next message of rank 0; raises after `timeout_s`, or when rank 0 is gone."""
        sized = self._received(self._room)
        size = SIZE_BYTES + int.from_bytes(sized[:SIZE_BYTES], "little")
        if size > self._room:
            sized += self._received(size - self._room)
        self._room = room_after(size)
        return pickle.loads(memoryview(sized)[SIZE_BYTES:])

    def _received(self, size: int) -> bytes:
        piece = torch.empty(size, dtype=torch.uint8)
        self.control.recv([piece], 0, 0).wait()
        return piece.numpy().tobytes()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, on every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def together(self, task: str) -> Iterator[None]:
        """Run a block that may fail on some ranks only; if it did, every rank raises.

        A rank that failed raises its own error, the others a PeerError that quotes it. Nobody is left waiting.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        reports = self.gather(None if error is None else as_peers_see_it(error, self.rank, task))
        for failure in (error, *reports):
            if failure is not None:
                failure.add_note(f"{SHARED}: {task}")
                raise failure

    def first_rank_only(self, task: str, run: Callable[[], Any]) -> None:
        """Rank 0 runs something that may take longer than `timeout_s` (a download); the others wait until it is done.

        Rank 0 says every second that it is still busy, so no single wait is long. Raises on every rank as `together`.
        """
        with ThreadPoolExecutor(1) as pool, self.together(task):
            work = pool.submit(run) if self.rank == 0 else None
            while not self.gather(work and bool(wait([work], BUSY_S).done))[0]:
                pass
            if work is not None:
                work.result()

    def abort(self) -> None:
        """Have NCCL's collectives give up, which may never end for want of a rank: its watchdog does not see those of a
        CUDA graph. Waits NCCL_CLOSE_S at most; `comm` is gone afterwards. gloo's end after `timeout_s`."""
        self._end_nccl(dist.distributed_c10d._abort_process_group)

    def leave(self) -> None:
        """Free this object's process groups (not the default group, which others may use).

        They are forgotten as well: gloo ends a group's connections, by which the other ranks see that this one has
        left, with the last reference to it. Whoever else holds them must let go, too (Transport.close).
        """
        self._end_nccl(dist.destroy_process_group)
        for group in (self.comm, self.control):
            if group is not None:
                dist.destroy_process_group(group)
        del self.comm, self.control

    def _end_nccl(self, end: Callable[[Any], None]) -> None:
        """Either way out of NCCL waits for what is queued, and for the other ranks of this host."""
        if self.comm is None or self.device.type != "cuda":
            return
        comm, self.comm = self.comm, None
        try:
            within(NCCL_CLOSE_S, functools.partial(end, comm), "leaving NCCL")
        except (TimeoutError, RuntimeError) as error:
            log.warning("%s", error)  # and not raised: whoever closes has other things to close
            dist.distributed_c10d._world.pg_names.pop(comm, None)  # or leaving the default group waits for it again


def room_after(size: int) -> int:
    """Bytes of a message's first piece, when the one before it had `size`: most steps are as long as the last one."""
    least, most = PIECE_BYTES
    return min(max(least, 1 << (size - 1).bit_length()), most)


def as_peers_see_it(error: Exception, rank: int, task: str) -> Exception:
    """What the other ranks raise: of the same kind where it is a plain one, so that callers can catch it."""
    for kind in (ValueError, TypeError, FileNotFoundError):
        if isinstance(error, kind):
            return kind(f"rank {rank}: {error}")
    return PeerError(f"rank {rank} failed in {task}: {type(error).__name__}: {error}")


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises this error, so that one of them reporting it is enough."""
    return any(note.startswith(SHARED) for note in getattr(error, "__notes__", ()))


def is_lost_peer(error: BaseException) -> bool:
    """Whether another rank went away or did not answer in time. gloo raises plain RuntimeErrors."""
    said_by_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return said_by_gloo or isinstance(error, dist.DistError | ConnectionError)


def environment_world_size() -> int:
    """The world size torchrun (or an initialised default group) gives this process; 1 without either."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_workers() -> bool:
    """Whether an LLM of this process has started its own ranks, and is still open."""
    return dist.group.WORLD is not None and dist.group.WORLD.group_desc == WORKERS


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one host meet that were not started by torchrun: the port of a TCPStore that rank 0 holds."""

    port: int
    rank: int
    world_size: int


def join(device: torch.device, timeout_s: float, meeting: Rendezvous | None = None) -> Ranks:
    """Join the group of `meeting`, else the default group if there is one, else the one torchrun's variables describe.

    Every wait on the groups is bounded by `timeout_s`. World size 1 needs no process group at all.
    """
    if meeting is None and environment_world_size() == 1:
        return Ranks(0, 1, device, timeout_s, None, None)
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        enter_default_group(timeout, meeting)
    control = dist.new_group(backend="gloo", timeout=timeout)
    agree_on_device(device, control)
    # NCCL's watchdog ends the process: the fused kernel's own bound, which names the peer, comes first, and then the
    # host's, which says what it waits for (Runner.fetch: twice this timeout).
    backend, bound = ("nccl", 3 * timeout) if device.type == "cuda" else ("gloo", timeout)
    comm = dist.new_group(backend=backend, timeout=bound)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, timeout_s, control, comm)
    if device.type == "cuda":
        start_nccl(ranks)
    return ranks


def start_nccl(ranks: Ranks) -> None:
    """Collective. Raises TimeoutError where a rank stays away."""
    try:
        within(ranks.timeout_s, functools.partial(first_sum, ranks.comm, ranks.device), "NCCL's start")
    except BaseException:
        ranks.abort()
        ranks.leave()
        raise


def first_sum(comm: Any, device: torch.device) -> None:
    """NCCL connects at its first collective, where it waits for every rank without a bound."""
    with torch.cuda.device(device):
        dist.all_reduce(torch.zeros(1, device=device), group=comm)


def agree_on_device(device: torch.device, control: Any) -> None:
    """Raises ValueError on every rank unless all compute on the same kind of device."""
    kinds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(kinds, device.type, group=control)
    if len(set(kinds)) > 1:
        dist.destroy_process_group(control)
        listed = ", ".join(f"rank {rank}: {kind}" for rank, kind in enumerate(kinds))
        raise ValueError(f"all ranks must compute on the same kind of device, found {listed}; set device on every rank")


def enter_default_group(timeout: timedelta, meeting: Rendezvous | None) -> None:
    one_host = meeting is not None or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if one_host:
        stay_on_loopback()
    if meeting is None:
        dist.init_process_group("gloo", timeout=timeout)
    else:
        store = dist.TCPStore("127.0.0.1", meeting.port, timeout=timeout)
        excepthook = sys.excepthook
        dist.init_process_group("gloo", store=store, rank=meeting.rank, world_size=meeting.world_size, timeout=timeout)
        assert dist.group.WORLD is not None
        dist.group.WORLD._set_group_desc(WORKERS)
        sys.excepthook = excepthook  # torch's puts a rank before each line of a traceback, once more for every group
    atexit.register(leave_at_exit)  # a process that ends with the group alive aborts


def stay_on_loopback() -> None:
    """Keep gloo on the loopback interface: the host's name may resolve to another, or to none."""
    names = [name for _, name in socket.if_nameindex()]
    for name in ("lo", "lo0"):
        if name in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def leave_default_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_at_exit() -> None:
    with ending_within(EXIT_S):
        leave_default_group()
