"""What `overlap="auto"` decides by is measured on the ranks themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.checkpoints import prompt_batch
from tokenweave import LLM, SamplingParams
from tokenweave.cost import measure
from tokenweave.cost.measure import carving_pays, fitting, measure_carve_out, measure_step_times
from tokenweave.weave.plan import BESIDE_SMS, StepTimes, plan_step

COUNTS = [1, 16, 128, 512]


@pytest.fixture(autouse=True)
def _counts(monkeypatch):
    monkeypatch.setattr(measure, "ROW_COUNTS", tuple(COUNTS))


class FakeRunner:
    """Remembers the steps that are timed; `gather` answers as if rank 0 had measured `theirs`."""

    def __init__(self, blocks: int = 1000, budget: int = 2048, max_model_len: int = 1024, theirs: float | None = None):
        self.storage = range(blocks)
        self.config = SimpleNamespace(block_size=16, max_num_batched_tokens=budget)
        self.max_model_len = max_model_len
        self.ranks = self
        self.device = torch.device("cpu")
        self.theirs = theirs
        self.plans: list = []

    def gather(self, value):
        if value is None or self.theirs is None:
            return [value]
        return [{mode: dict.fromkeys(times, self.theirs) for mode, times in value.items()}, value]

    def blank_batch(self, rows: int) -> int:
        return rows

    def forward(self, batch: int, plan) -> None:
        assert plan.rows == batch
        self.plans.append(plan)

    def check(self) -> None:
        pass

    def synchronize(self) -> None: ...


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        ({}, COUNTS),
        ({"blocks": 1}, [1, 16]),
        ({"blocks": 31}, [1, 16, 128]),
        ({"budget": 100}, [1, 16]),
        ({"max_model_len": 15}, [1]),
    ],
)
def test_only_steps_that_could_happen_are_timed(limits, rows):
    assert fitting(FakeRunner(**limits)) == rows


def test_on_cuda_the_largest_step_is_timed_as_well():
    runner = FakeRunner(budget=700)
    runner.device = torch.device("cuda")
    assert fitting(runner) == [*COUNTS, 700]


def test_every_mode_is_timed_at_every_count():
    runner = FakeRunner()
    times = measure_step_times(runner)
    assert list(times.seconds) == ["off", "fused", "weave"]
    assert all(list(seconds) == COUNTS for seconds in times.seconds.values())
    assert {(plan.rows, plan.cut, plan.form) for plan in runner.plans} == {
        (plan.rows, plan.cut, plan.form)
        for rows in COUNTS
        for plan in (plan_step(mode, rows, None) for mode in ("off", "fused", "weave"))
    }


@pytest.mark.parametrize(
    ("step_s", "expected"),
    [
        (lambda rows: 0.001 * rows, [1, 16, 128, 512]),  # 0.512 s
        (lambda rows: 0.2 + 0.004 * rows, [1, 16, 128]),  # 0.712 s, and 512 rows would take 2.2 s
        (lambda rows: 0.03 * rows, [1, 16]),  # 0.48 s, and 128 rows would take 3.8 s
        (lambda rows: 60.0, [1]),
    ],
)
def test_steps_that_would_take_long_are_left_out(monkeypatch, step_s, expected):
    monkeypatch.setattr(measure, "time_step", lambda runner, plan: step_s(plan.rows))
    assert list(measure_step_times(FakeRunner()).seconds["off"]) == expected


def test_rank_0s_figures_are_everyones(monkeypatch):
    monkeypatch.setattr(measure, "time_step", lambda runner, plan: 0.25)
    assert measure_step_times(FakeRunner(theirs=0.125)).predict("weave", 16) == 0.125
    assert measure_step_times(FakeRunner()).predict("weave", 16) == 0.25


# -- whether GEMMs leave the sums' SMs free ----------------------------------------------------------------------------


class CarvingRunner(FakeRunner):
    """On each of two ranks GEMMs can be told or not; rank 0 finds what this rank does, or the contrary."""

    def __init__(self, carves: bool = True, peer_carves: bool = True, world_size: int = 2, contrary: bool = False):
        super().__init__()
        self.carves, self.peer_carves, self.world_size, self.contrary = carves, peer_carves, world_size, contrary

    def gather(self, value):
        return [value, self.peer_carves] if not self.plans else [value != self.contrary, value]


def seconds_by(carved_s: float, seen: list):
    """Steps of 1 s, of `carved_s` with a carve-out; the first of each kind are misleading."""

    def seconds(plan) -> float:
        seen.append(plan)
        if (times := seen.count(plan)) <= measure.WARM_UPS:
            return 0.1 * times if plan.carve_out else 60.0
        return carved_s if plan.carve_out else 1.0

    return seconds


@pytest.mark.parametrize(("carved_s", "pays"), [(0.7, True), (0.985, True), (0.995, False), (1.0, False), (1.3, False)])
def test_a_carve_out_is_taken_where_it_is_measured_to_pay(carved_s, pays):
    seen: list = []
    assert carving_pays(seconds_by(carved_s, seen), 100_000) == pays
    assert {plan.rows for plan in seen} == {measure.CARVING_ROWS}
    assert [plan.carve_out for plan in seen] == [False, True] * (len(seen) // 2), "in turn"
    assert {plan.carved_sms for plan in seen} == {0, BESIDE_SMS}


def test_a_step_that_cannot_be_woven_tells_nothing():
    assert not carving_pays(seconds_by(0.5, []), 1)


def test_the_ranks_carve_as_rank_0_does(monkeypatch):
    for contrary in (False, True):
        runner = CarvingRunner(contrary=contrary)
        timed = seconds_by(0.5, runner.plans)
        monkeypatch.setattr(measure, "time_step", lambda _, plan, timed=timed: timed(plan))
        assert measure_carve_out(runner) != contrary


@pytest.mark.parametrize("alike", [{"carves": False}, {"peer_carves": False}, {"world_size": 1}])
def test_nothing_is_timed_where_gemms_cannot_be_told(alike):
    runner = CarvingRunner(**alike)
    assert not measure_carve_out(runner)
    assert not runner.plans


def test_woven_steps_are_timed_as_they_will_run():
    runner = FakeRunner()
    measure_step_times(runner, carve_out=True)
    assert all(bool(plan.carved_sms) == (plan.cut is not None) for plan in runner.plans)


def measured(folder: Path) -> tuple[StepTimes | None, list[list[int]]]:
    """Runs on every rank: what was measured, and what is generated afterwards."""
    with LLM(folder, progress=False, overlap="auto", num_kv_blocks=20) as llm:
        outputs = llm.generate(prompt_batch(1, (40, 3)), SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
        return llm._rank.times, [output.outputs[0].token_ids for output in outputs]


def test_on_real_ranks(ranks, checkpoint):
    """And what measuring left in the cache disturbs nobody."""
    ((alone, tokens),) = ranks(1).run(measured, checkpoint("llama"))
    assert alone is None
    (ours, ours_tokens), (theirs, theirs_tokens) = ranks(2).run(measured, checkpoint("llama"))
    assert ours == theirs
    assert all(seconds > 0 for times in ours.seconds.values() for seconds in times.values())
    assert ours_tokens == theirs_tokens == tokens
