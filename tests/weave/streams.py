"""Two streams on a CPU. Work runs when it is queued, as a host queues it, and all is noted: what each operator touched,
every event and every wait. So a step can be looked at as the device may run it, with any event or wait left out.

    streams = FakeStreams()
    runner.lane = StreamLane(streams, (streams,))
    with streams:
        runner.forward(batch, plan)
    hazards(streams.notes)                  # [] if every access is in order
    hazards(without(streams.notes, 7))      # as if the 7th event or wait were not in the code
    run_again(streams.notes, latest)        # the same operators on the same memory, comm as late as it may be
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tokenweave.weave.accesses import ByteRange, accesses, byte_range, tensors_in
from tokenweave.weave.conflicts import Access, Clocks, Hazard, find_hazards
from tokenweave.weave.job import Job, Observer
from tokenweave.weave.streams import COMM, COMPUTE


@dataclass(frozen=True, eq=False)
class Op:
    """One operator, on the tensors that it had and gave."""

    stream: str
    where: str
    func: Any
    args: Any
    kwargs: Any
    result: Any

    @cached_property
    def touched(self) -> list[tuple[ByteRange, bool]]:
        """(bytes, whether they are written). The tensors are kept here, so that no address means two things."""
        reads, writes = accesses(self.func, self.args, self.kwargs, self.result)
        both = [(tensor, False) for tensor in reads] + [(tensor, True) for tensor in writes]
        return [(byte_range(tensor), write) for tensor, write in both if tensor.numel()]


@dataclass(frozen=True, eq=False)
class Mark:
    """An event was recorded on the stream, or the stream waits for one. job: number of the job that it belongs to."""

    stream: str
    waits: bool
    event: FakeEvent


@dataclass(frozen=True, eq=False)
class FakeEvent:
    job: int

    def query(self) -> bool:
        return True


Note = Op | Mark


class FakeStreams(Observer):
    """Stands in for CudaStreams; as an observer of its lane it learns what each job is called."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.jobs: list[Job] = []
        self.stream, self.where = COMPUTE, "start of the step"

    def record(self, stream: str) -> FakeEvent:
        event = FakeEvent(len(self.jobs) - 1)
        self.notes.append(Mark(stream, False, event))
        return event

    def wait(self, stream: str, event: FakeEvent) -> None:
        self.notes.append(Mark(stream, True, event))

    @contextmanager
    def comm(self) -> Iterator[None]:
        job, outer = self.jobs[-1], self.where
        self.stream, self.where = COMM, f"{job.kind} of half {job.half} at {job.site}"
        yield
        self.stream, self.where = COMPUTE, outer

    def submitted(self, job: Job) -> None:
        self.jobs.append(job)

    def waited(self, job: Job) -> None:
        self.where = f"half {job.half} after {job.site}"

    def __enter__(self) -> FakeStreams:
        self.notes, self.jobs = [], []
        self._mode = NoteMode(lambda *op: self.notes.append(Op(self.stream, self.where, *op)))
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)


class NoteMode(TorchDispatchMode):
    """While entered, notes every operator of this thread: (function, args, kwargs, result)."""

    def __init__(self, note: Callable[[Any, Any, Any, Any], None]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(func, args, kwargs or {}, result)
        return result


def marks(notes: Sequence[Note]) -> list[Mark]:
    return [note for note in notes if isinstance(note, Mark)]


def without(notes: Sequence[Note], number: int) -> list[Note]:
    """As if the `number`th event or wait were not there. What waits for an event that was not recorded goes on."""
    missing = marks(notes)[number]
    return [note for note in notes if note is not missing]


def hazards(notes: Sequence[Note]) -> list[Hazard]:
    """The accesses in conflict that no event orders."""
    return find_hazards(clocked(notes, Clocks()))


def is_joined(notes: Sequence[Note]) -> bool:
    """Whether all that comm did comes before what compute does next: else a capture of both cannot end."""
    clocks = Clocks()
    epochs = [access.epoch for access in clocked(notes, clocks) if access.lane == COMM]
    return clocks.now(COMPUTE).get(COMM, 0) >= max(epochs)


def clocked(notes: Sequence[Note], clocks: Clocks) -> list[Access]:
    """Every access, with the clock of its stream at that time."""
    sent, found = {}, []
    for note in notes:
        if isinstance(note, Mark) and not note.waits:
            sent[note.event] = clocks.send(note.stream)
        elif isinstance(note, Mark):
            clocks.merge(note.stream, sent.get(note.event, {}))
        else:
            now, op = clocks.now(note.stream), str(note.func)
            found += [Access(note.stream, op, note.where, bytes_, write, now) for bytes_, write in note.touched]
    return found


# -- run again, in another order ---------------------------------------------------------------------------------------

Choose = Callable[[list[str]], str]  # which of the streams that can go on is next


def earliest(able: list[str]) -> str:
    """Comm runs whenever it can."""
    return COMM if COMM in able else COMPUTE


def latest(able: list[str]) -> str:
    """Comm runs only when compute waits for it."""
    return COMPUTE if COMPUTE in able else COMM


def run_again(notes: Sequence[Note], choose: Choose) -> None:
    """Every operator once more, into the memory of its first results; each stream in order, and behind its events."""
    queues = {stream: [note for note in notes if note.stream == stream] for stream in (COMPUTE, COMM)}
    recorded = {mark.event for mark in marks(notes) if not mark.waits}
    at, done = dict.fromkeys(queues, 0), set[FakeEvent]()

    def can(stream: str) -> bool:
        if at[stream] == len(queues[stream]):
            return False
        note = queues[stream][at[stream]]
        return not (isinstance(note, Mark) and note.waits and note.event in recorded - done)

    while able := [stream for stream in queues if can(stream)]:
        stream = choose(able)
        note = queues[stream][at[stream]]
        at[stream] += 1
        if isinstance(note, Op):
            repeat(note)
        elif not note.waits:
            done.add(note.event)
    assert all(at[stream] == len(queue) for stream, queue in queues.items()), "the streams wait for each other"


def repeat(op: Op) -> None:
    """The operator on the same tensors; what it returned the first time gets the new values."""
    store(op.result, op.func(*op.args, **op.kwargs))


def store(kept: Any, again: Any) -> None:
    for old, new in zip(tensors_in(kept), tensors_in(again), strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


def is_uninitialised(op: Op) -> bool:
    return op.func._opname.startswith(("empty", "new_empty"))
