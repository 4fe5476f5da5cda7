"""A woven step as the sum of its turns, against weave() itself run on a clock that is moved by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.parts import SITES
from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk
from tokenweave.cost.woven import Beside
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
TURNS = st.lists(st.tuples(TURN, TURN), min_size=1, max_size=12)


def added_up(turns):
    """(end, hidden seconds) as Woven has it: every segment beside one whole sum, the other half's last one."""
    segments = [turn for pair in turns for turn in pair]
    sums_s = [0.0, *(sum_s for _, _, sum_s in segments)]
    each = [
        Beside(*map(np.array, (alone_s, beside_s, before_s)))
        for (alone_s, beside_s, _), before_s in zip(segments, sums_s)
    ]
    return sum(beside.seconds for beside in each) + sums_s[-1], sum(beside.hidden_s for beside in each)


@given(turns=TURNS)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_woven_step_is_the_sum_of_its_turns(turns):
    end_s, hidden_s = added_up(turns)
    woven_s, woven_hidden_s = as_woven(turns)
    assert end_s == pytest.approx(woven_s, rel=1e-9, abs=1e-9)
    assert hidden_s == pytest.approx(woven_hidden_s, rel=1e-6, abs=1e-6)


def test_a_sum_hides_behind_the_other_halfs_segment():
    turn = (1.0, 1.25, 1.25)
    end_s, _ = added_up([(turn, turn)] * 1000)
    # the first half's first segment has nothing beside it, and the last sum nothing behind it
    assert end_s == pytest.approx(1.0 + 1999 * 1.25 + 1.25)


def test_without_sums_the_segments_add_up():
    assert added_up([((1.0, 9.0, 0.0), (2.0, 9.0, 0.0))] * 10) == (30.0, 0.0)


MODELS = ["Llama-3.1-8B", "Gemma-2-9B", "OLMo-2-7B", "Qwen3-30B-A3B"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("drops_rows", [True, False])
def test_a_step_is_laid_out_as_weave_runs_it(model, drops_rows):
    """Turn by turn, with every part's own figures: embedding, all layers, the last one's few rows, the head."""
    cost = Cost(PUBLISHED[model], find_hardware("h100-sxm"), 4, drops_rows=drops_rows)
    chunks = [Chunk(1, 700), Chunk(1500, 300), Chunk(40, 0, wanted=0), *[Chunk(1, 2000)] * 9]
    step = Step(cost, Batch(chunks))
    for cut in (1, 600, 1545):
        woven = step.woven([cut], [2, 16])
        known = {(turn.part, key(turn.before)): beside for turn, beside in woven.turns()}
        turns, before = [], None
        for part in (part for block in cost.parts.blocks for part in block.parts * block.repeats):
            beside = known[part, key(before)]
            own_s = cost.request_s(part, woven.work, "weave", 2 if SITES[part.site] == 0 else 16)
            sms = [SITES[(before or part).site], SITES[part.site]]
            turns.append(
                [
                    (beside.alone_s[h, 0], beside.beside_s[sms[h], h, 0], np.broadcast_to(own_s, (2, 1))[h, 0])
                    for h in (0, 1)
                ]
            )
            before = part
        end_s, hidden_s = as_woven(turns)
        assert woven.device_s(0, 0, 1) == pytest.approx(end_s, rel=1e-9)
        assert woven.hidden_s(0, 0, 1) == pytest.approx(hidden_s, rel=1e-6)


def key(before):
    return before and (before.request, SITES[before.site])
