"""The two lanes against weave() itself, run on a clock that is moved by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.cost.lanes import TwoLanes
from tokenweave.weave.weave import weave

SECONDS = st.floats(0, 10).map(lambda x: round(x, 3))


@dataclass
class Clock:
    """When each lane is free, and the (start, end) of every sum."""

    compute_s: float = 0.0
    comm_s: float = 0.0
    hidden_s: float = 0.0


class Request:
    """A sum of known length. As a channel's submit does, it queues on the comm lane and gives a handle to wait on."""

    def __init__(self, clock, sum_s):
        self.clock, self.sum_s = clock, sum_s

    def submit(self, channel):
        self.clock.comm_s = max(self.clock.comm_s, self.clock.compute_s) + self.sum_s
        self.end_s = self.clock.comm_s
        channel.append(self)
        return self

    def wait(self):
        self.clock.compute_s = max(self.clock.compute_s, self.end_s)

    def drain(self): ...


def strand(clock, turns, other):
    """Computes each segment in small steps: at `beside` speed while the other half's last sum is on the wire."""
    for alone_s, beside_s, sum_s in turns:
        left, start_s = 1.0, clock.compute_s
        busy_s = max(0.0, other[-1].end_s - start_s) if other else 0.0
        if beside_s and busy_s:
            together_s = min(busy_s, beside_s)
            clock.compute_s += together_s
            clock.hidden_s += together_s
            left -= together_s / beside_s
        clock.compute_s += left * alone_s
        yield Request(clock, sum_s)


def as_woven(turns):
    """(end, hidden seconds) of weave() itself."""
    clock, channels = Clock(), ([], [])
    halves = [[pair[half] for pair in turns] for half in (0, 1)]
    weave([strand(clock, halves[half], channels[1 - half]) for half in (0, 1)], channels)
    return max(clock.compute_s, clock.comm_s), clock.hidden_s


TURN = st.tuples(SECONDS, SECONDS, SECONDS).map(lambda t: (t[0], t[0] + t[1], t[2]))  # beside a sum: never faster
TURNS = st.lists(st.tuples(TURN, TURN), min_size=1, max_size=5)


@given(before=TURNS, block=TURNS, repeats=st.integers(1, 40), after=TURNS)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_lanes_are_laid_out_as_weave_runs(before, block, repeats, after):
    lanes = TwoLanes()
    for turns, times in ((before, 1), (block, repeats), (after, 1)):
        lanes.run_block(turns, times)
    end_s, hidden_s = as_woven([*before, *block * repeats, *after])
    assert lanes.end_s == pytest.approx(end_s, rel=1e-6, abs=1e-9)
    assert lanes.hidden_s == pytest.approx(hidden_s, rel=1e-6, abs=1e-6)


def test_a_sum_hides_behind_the_other_halfs_segment():
    lanes = TwoLanes()
    turn = (1.0, 1.25, 1.25)
    lanes.run_block([(turn, turn)], 1000)
    # the first half's first segment has nothing beside it, and the last sum nothing behind it
    assert lanes.end_s == pytest.approx(1.0 + 1999 * 1.25 + 1.25)


def test_without_sums_the_segments_add_up():
    lanes = TwoLanes()
    lanes.run_block([((1.0, 9.0, 0.0), (2.0, 9.0, 0.0))], 10)
    assert lanes.end_s == 30.0
    assert lanes.hidden_s == 0.0


def test_alike_rounds_are_not_laid_out_one_by_one(monkeypatch):
    lanes, rounds, run = TwoLanes(), [], TwoLanes.run
    monkeypatch.setattr(TwoLanes, "run", lambda self, turns: (rounds.append(1), run(self, turns)))
    lanes.run_block([((1.0, 1.2, 0.7), (1.1, 1.3, 0.9)), ((3.0, 3.2, 0.7), (2.1, 2.3, 0.9))], 80)
    assert len(rounds) < 6
