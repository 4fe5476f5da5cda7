"""Hazards: two lanes touch the same bytes, one of them writes, and no submit or wait puts the two in order.

A recording shows them whether or not they did harm while it was made: one whose numbers are right is found as well.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, UntypedStorage

from tokenweave.weave.accesses import AccessMode, byte_range, tensors_in
from tokenweave.weave.conflicts import Access, Clock, Clocks, Hazard, find_hazards
from tokenweave.weave.lanes import Job, Observer

COMPUTE, COMM = "compute", "comm"


class HazardRecorder(Observer):
    """Records what each lane touches while it is entered; `check` then names the conflicts.

        recorder = HazardRecorder()
        rank = open_rank(config, observers=(recorder,))
        with recorder:
            rank.runner.forward(batch, plan)
        assert recorder.check() == []

    Enter it on the compute thread; entering it again starts a new recording. A result that a strand has received is
    lent until that half's next request: a write in between, be it by the strand itself, is in conflict with the loan.
    Memory that was touched is kept until the next recording, so that no address means two things.
    """

    def __init__(self) -> None:
        self.accesses: list[Access] = []
        self._thread = _Thread()
        self._recording = False

    def __enter__(self) -> HazardRecorder:
        self.accesses = []
        self._storages: dict[int, UntypedStorage] = {}
        self._clocks = Clocks()
        self._sent: dict[Job, Clock] = {}
        self._recording = True
        self._thread.enter(COMPUTE, "start of the step", AccessMode(self._record))
        return self

    def __exit__(self, *_: object) -> None:
        self._recording = False
        while self._thread.outer:  # more than one, where a job that ran in line raised
            self._thread.leave()

    def check(self) -> list[Hazard]:
        """The conflicts in the last recording."""
        return find_hazards(self.accesses)

    def touches(self, reads: list[Tensor], writes: list[Tensor]) -> None:
        """For the wrapper of a kernel that torch cannot see into: what it reads and writes, on the lane that calls."""
        if self._recording:
            self._record("kernel", reads, writes)

    # -- the order, as lanes tell it -------------------------------------------------------------------------------

    def submitted(self, job: Job) -> None:
        if self._recording:
            self._clocks.merge(COMPUTE, self._clocks.send(loan(job)))
            self._sent[job] = self._clocks.send(COMPUTE)

    def started(self, job: Job) -> None:
        if self._recording:
            self._clocks.merge(COMM, self._sent.pop(job, {}))
            self._thread.enter(COMM, f"{job.kind} of half {job.half} at {job.site}", AccessMode(self._record))

    def finished(self, job: Job) -> None:
        if self._thread.lane == COMM:
            self._thread.leave()
            self._sent[job] = self._clocks.send(COMM)

    def waited(self, job: Job) -> None:
        if self._recording:
            self._clocks.merge(COMPUTE, self._sent.pop(job, {}))
            self._thread.where = f"half {job.half} after {job.site}"

    def received(self, job: Job, result: Any) -> None:
        if self._recording:
            self._clocks.merge(loan(job), self._clocks.send(COMPUTE))
            for tensor in tensors_in(result):
                self._add(loan(job), "loan", f"{job.kind} at {job.site}", tensor, False)

    # -- the accesses ----------------------------------------------------------------------------------------------

    def _record(self, op: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        for tensors, write in ((reads, False), (writes, True)):
            for tensor in tensors:
                self._add(self._thread.lane, op, self._thread.where, tensor, write)

    def _add(self, lane: str, op: str, where: str, tensor: Tensor, write: bool) -> None:
        if tensor.numel():
            touched = byte_range(tensor)
            self._storages.setdefault(touched.storage, tensor.untyped_storage())
            self.accesses.append(Access(lane, op, where, touched, write, self._clocks.now(lane)))


def loan(job: Job) -> str:
    """The lane, so to speak, on which a half holds what it has received: not ordered with what its strand does."""
    return f"half {job.half} loan"


class _Thread(threading.local):
    """What a thread is at. A stack, since a comm lane may run on the compute thread; the mode watches all of it."""

    def __init__(self) -> None:
        self.lane = self.where = ""
        self.outer: list[tuple[str, str]] = []

    def enter(self, lane: str, where: str, mode: AccessMode) -> None:
        if not self.outer:
            mode.__enter__()
            self.mode = mode
        self.outer.append((self.lane, self.where))
        self.lane, self.where = lane, where

    def leave(self) -> None:
        self.lane, self.where = self.outer.pop()
        if not self.outer:
            self.mode.__exit__(None, None, None)
