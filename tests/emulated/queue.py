"""What a GPU has been given to do, on which stream, and what the host may know of it.

Operators run when they are queued. A copy that the host does not wait for ends only when the host has seen an event
behind it: until then what it writes on the host is garbage, and what it reads there must stay as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.capture import Recording, check
from tests.emulated.values import tensors_of
from tests.weave.streams import Mark, Note, Op
from tokenweave.weave.accesses import storage_address
from tokenweave.weave.conflicts import Clock, Clocks

DEFAULT = "stream 0"


class Copy:
    """One that is under way. end: what to do when the host sees that it is done."""

    def __init__(self, end: Callable[[], None]):
        self._end: Callable[[], None] | None = end

    @property
    def done(self) -> bool:
        return self._end is None

    def arrive(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end()


@dataclass(eq=False)
class Recorded:
    """What an event stands behind: copies, and if it was recorded in a capture, all that its stream knew of there."""

    copies: set[Copy]
    capture: Capture | None
    clock: Clock
    looks: int = 0  # of the host


class Capture:
    """Of a graph. Nothing runs on a GPU while it is captured, so what operators did meanwhile is undone at its end."""

    def __init__(self, origin: str):
        self.origin = origin
        self.ops: list[Op] = []
        self.clocks = Clocks()
        self.last = {origin: 0}  # of each stream that has joined: the epoch of its last operator
        self.notes: list[Note] = []
        self.own: set[int] = set()  # addresses of storages that were made meanwhile
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by address of a storage: its bytes, and a copy of them

    def keep(self, tensors: list[Tensor]) -> None:
        """The bytes of storages that an operator is about to touch."""
        for tensor in tensors:
            address = storage_address(tensor)
            if address not in self.before and address not in self.own:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[address] = whole, whole.clone()

    def add(self, op: Op) -> None:
        if op.stream not in self.last:
            raise RuntimeError(f"CUDA error: {op.func} is queued on {op.stream}, which has not joined the capture")
        check(op)
        self.ops.append(op)
        self.own |= {storage_address(tensor) for tensor in tensors_of(op.result)} - self.before.keys()
        self.last[op.stream] = self.clocks.now(op.stream)[op.stream]

    def end(self) -> Recording:
        for whole, kept in self.before.values():
            whole.copy_(kept)
        known = self.clocks.now(self.origin)
        if any(known.get(stream, 0) < epoch for stream, epoch in self.last.items() if stream != self.origin):
            raise RuntimeError("CUDA error: capturing stream has unjoined work")
        return Recording(self.ops)


@dataclass
class Queue:
    """notes: all that was queued while `noting` was set, and all of each graph, for tests.weave.streams.hazards.

    sync_debug_mode: as torch.cuda.set_sync_debug_mode; "error": the host must not wait.
    """

    stream: str = DEFAULT  # the current one
    capture: Capture | None = None
    copies: dict[str, set[Copy]] = field(default_factory=dict)  # that are under way, by stream
    sync_debug_mode: str = "default"
    noting: bool = False
    notes: list[Note] = field(default_factory=list)
    graphs: list[list[Note]] = field(default_factory=list)
    streams: dict[str, Any] = field(default_factory=dict)  # all, by name
    worked: set[str] = field(default_factory=set)  # those that were given operators, outside of captures

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """func: an operator of torch or a Launch, on the tensors that hold the values."""
        if self.capture is not None:
            self.capture.keep(tensors_of((args, kwargs)))
        result = func(*args, **kwargs)
        op = Op(self.stream, "", func, args, kwargs, result)
        if self.capture is not None:
            self.capture.add(op)
        else:
            self.worked.add(self.stream)
        self.note(op)
        return result

    def note(self, note: Note) -> None:
        """A graph is launched as one: what is captured is in order with the rest if it is in order within."""
        if self.noting:
            (self.notes if self.capture is None else self.capture.notes).append(note)

    def later(self, end: Callable[[], None]) -> None:
        """A copy is queued."""
        self.copies.setdefault(self.stream, set()).add(Copy(end))

    def host_waits(self, what: str) -> None:
        """RuntimeError where it must not."""
        if self.capture is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        self.drain()

    def drain(self) -> None:
        for copies in self.copies.values():
            for copy in copies:
                copy.arrive()
        self.copies.clear()
        for stream in self.streams:
            event = object()
            self.note(Mark(stream, False, event))  # type: ignore[arg-type]
            self.host_saw(event)

    def host_saw(self, event: Any) -> None:
        """What is queued from here on, anywhere, comes after the event."""
        for stream in self.streams:
            self.note(Mark(stream, True, event))

    # -- graphs ----------------------------------------------------------------------------------------------------

    def begin_capture(self) -> None:
        if self.stream == DEFAULT:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if self.capture is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing: a capture")
        self.capture = Capture(self.stream)

    def end_capture(self) -> Recording:
        capture, self.capture = self.capture, None
        assert capture is not None
        assert capture.origin == self.stream
        self.graphs += [capture.notes] * self.noting
        return capture.end()

    # -- events ----------------------------------------------------------------------------------------------------

    def record(self, stream: str, event: Any) -> Recorded:
        capture = self.capture if self.capture and stream in self.capture.last else None
        self.note(Mark(stream, False, event))
        clock = capture.clocks.send(stream) if capture else {}
        return Recorded({copy for copy in self.copies.get(stream, ()) if not copy.done}, capture, clock)

    def stream_waits(self, stream: str, event: Any, recorded: Recorded | None) -> None:
        if recorded is None:
            return  # never recorded: done, as on a GPU
        inside = self.capture is not None and stream in self.capture.last
        if recorded.capture is not self.capture and (inside or recorded.capture is not None):
            raise RuntimeError("CUDA error: a dependency between work that is captured and work that is not")
        if recorded.capture is not None:
            recorded.capture.last.setdefault(stream, 0)
            recorded.capture.clocks.merge(stream, recorded.clock)
        self.note(Mark(stream, True, event))
        self.copies[stream] = {copy for copy in self.copies.get(stream, set()) | recorded.copies if not copy.done}
