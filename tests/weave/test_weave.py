"""The loop: first in, first out over any number of strands, and nothing left in flight when something raises."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.weave.weave import weave


@dataclass
class Log:
    """What happened, in order: (what, half, request)."""

    events: list[tuple[str, int, int]] = field(default_factory=list)

    def of(self, *whats: str) -> list[tuple[int, int]]:
        return [(half, request) for what, half, request in self.events if what in whats]


@dataclass(frozen=True)
class Channel:
    log: Log
    half: int


@dataclass(frozen=True)
class Request:
    """`fails`: "submit" or "wait" raises OSError."""

    number: int
    fails: str = ""

    def submit(self, channel: Channel) -> "Pending":
        channel.log.events.append(("submit", channel.half, self.number))
        if self.fails == "submit":
            raise OSError("no wire")
        return Pending(self, channel)


@dataclass(frozen=True)
class Pending:
    request: Request
    channel: Channel

    def wait(self) -> tuple[int, int]:
        self._note("wait")
        if self.request.fails == "wait":
            raise OSError("lost a peer")
        return self.channel.half, self.request.number

    def drain(self) -> None:
        self._note("drain")

    def _note(self, what: str) -> None:
        self.channel.log.events.append((what, self.channel.half, self.request.number))


def strand(
    log: Log, half: int, requests: int, raises_at: int | None = None, fails: dict[int, str] | None = None
) -> Generator[Request, Any, list[Any]]:
    """Makes `requests` requests, with a segment before each and one after the last; returns what it was given."""
    given = []
    for number in range(requests + 1):
        log.events.append(("segment", half, number))
        if number == raises_at:
            raise ArithmeticError(f"segment {number} of half {half}")
        if number < requests:
            given.append((yield Request(number, (fails or {}).get(number, ""))))
    return given


def run(log: Log, *strands: Generator[Any, Any, Any]) -> list[Any]:
    return weave(strands, [Channel(log, half) for half in range(len(strands))])


def received(half: int, requests: int) -> list[tuple[int, int]]:
    return [(half, number) for number in range(requests)]


def test_no_strands():
    assert weave([], []) == []


def test_one_strand_is_the_plain_forward_pass():
    log = Log()
    assert run(log, strand(log, 0, 3)) == [received(0, 3)]
    cycle = [(what, 0, number) for number in range(3) for what in ("segment", "submit", "wait")]
    assert log.events == [*cycle, ("segment", 0, 3)]


def test_two_strands_take_turns():
    log = Log()
    assert run(log, strand(log, 0, 2), strand(log, 1, 2)) == [received(0, 2), received(1, 2)]
    assert log.events == [
        ("segment", 0, 0), ("submit", 0, 0),
        ("segment", 1, 0), ("submit", 1, 0),
        ("wait", 0, 0), ("segment", 0, 1), ("submit", 0, 1),
        ("wait", 1, 0), ("segment", 1, 1), ("submit", 1, 1),
        ("wait", 0, 1), ("segment", 0, 2),
        ("wait", 1, 1), ("segment", 1, 2),
    ]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_any_strands_first_in_first_out(lengths):
    log = Log()
    assert run(log, *(strand(log, half, n) for half, n in enumerate(lengths))) == [
        received(half, n) for half, n in enumerate(lengths)
    ]
    assert log.of("wait") == log.of("submit")
    for half, n in enumerate(lengths):  # a segment never runs before the one whose keys and values it may read
        earlier = [at for at, event in enumerate(log.events) if event[:2] == ("segment", half)]
        later = [at for at, event in enumerate(log.events) if event[:2] == ("segment", half + 1)]
        assert len(earlier) == n + 1
        assert all(one < other for one, other in zip(earlier, later, strict=False))


def test_a_first_segment_that_raises():
    log = Log()
    with pytest.raises(ArithmeticError, match="segment 0 of half 1"):
        run(log, strand(log, 0, 2), strand(log, 1, 2, raises_at=0), strand(log, 2, 2))
    assert log.events == [("segment", 0, 0), ("submit", 0, 0), ("segment", 1, 0), ("drain", 0, 0)]


@pytest.mark.parametrize("half", [0, 1, 2])
@pytest.mark.parametrize("raises_at", [1, 2, 3])
def test_a_later_segment_that_raises(half, raises_at):
    log = Log()
    strands = [strand(log, i, 3, raises_at=raises_at if i == half else None) for i in range(3)]
    with pytest.raises(ArithmeticError, match=f"segment {raises_at} of half {half}"):
        run(log, *strands)
    check_nothing_in_flight(log)
    assert log.events[-1][0] == "drain" or (half, raises_at) == (2, 3)  # the very last segment: all sums are done


@pytest.mark.parametrize("half", [0, 1, 2])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("fails", ["submit", "wait"])
def test_a_sum_that_raises(half, number, fails):
    log = Log()
    strands = [strand(log, i, 3, fails={number: fails} if i == half else None) for i in range(3)]
    with pytest.raises(OSError, match="no wire" if fails == "submit" else "lost a peer"):
        run(log, *strands)
    if fails == "submit":
        log.events.remove(("submit", half, number))  # it never took off
    check_nothing_in_flight(log)


def test_an_interrupt_drains_too():
    log = Log()

    def interrupted() -> Generator[Request, Any, None]:
        yield Request(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(log, interrupted(), strand(log, 1, 2))
    check_nothing_in_flight(log)


def check_nothing_in_flight(log: Log) -> None:
    """Every sum that was submitted was waited for, or drained, once; the drained ones last and in order."""
    assert sorted(log.of("wait", "drain")) == sorted(log.of("submit"))
    assert log.of("drain") == log.of("submit")[len(log.of("wait")) :]
