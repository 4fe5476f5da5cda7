"""A job for a lane, and who may watch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)  # a job is itself, however like another it is
class Job:
    """One piece of work for a lane, with the words that timelines and errors describe it by."""

    run: Callable[[], Any]
    kind: str = "sum"  # "sum" | "gather"
    site: str = ""
    half: int = 0
    rows: int = 0
    inline: bool = False  # runs on the compute lane


class Observer:
    """What may watch a lane: timelines and the hazard checker. Every hook does nothing here."""

    def submitted(self, job: Job) -> None:
        """On the compute lane, before the job is queued."""

    def started(self, job: Job) -> None:
        """On the comm lane, before the job runs."""

    def finished(self, job: Job) -> None:
        """On the comm lane, after the job ran."""

    def waiting(self, job: Job) -> None:
        """On the compute lane, before it waits."""

    def waited(self, job: Job) -> None:
        """On the compute lane, after it waited."""

    def received(self, job: Job, result: Any) -> None:
        """On the compute lane, when the job's strand gets the result, which is its until its half's next request."""
