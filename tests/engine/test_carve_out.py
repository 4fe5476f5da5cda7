"""Where GEMMs are told how many SMs sums leave: around woven steps, and while they are captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.capture import FakeCapturer, captured_runner
from tests.checkpoints import prompt_batch
from tests.runtime import watched_generate
from tokenweave import LLM, SamplingParams
from tokenweave.cost.choice import Choice
from tokenweave.cost.measure import REPEATS, WARM_UPS
from tokenweave.engine import rank as rank_module
from tokenweave.engine import runner as runner_module
from tokenweave.engine.stepper import Stepper
from tokenweave.models import layers
from tokenweave.weave.plan import Plan

OPTIONS = {"device": "cpu", "num_kv_blocks": 32, "max_model_len": 64}
WOVEN = Plan(40, 20, "sharded", attention_sms=4, mlp_sms=8)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
TIMES = 3  # by then a step has been captured and is launched


@pytest.fixture
def told(monkeypatch) -> list[Any]:
    """How many SMs GEMMs are told to leave free, GEMMs among them, and captures."""
    seen: list[Any] = []
    linear, capture = layers.linear, FakeCapturer.capture

    @contextmanager
    def leave_free(sms: int, device: torch.device, biases: bool) -> Iterator[None]:
        seen.append(sms)
        try:
            yield
        finally:
            seen.append("all")

    def watched(*args: Any, **kwargs: Any) -> Any:
        if seen[-1] != "GEMMs":
            seen.append("GEMMs")
        return linear(*args, **kwargs)

    def captured(self: FakeCapturer, run: Any) -> Any:
        seen.append("capture")
        replay = capture(self, run)
        seen.append("captured")
        return lambda: (seen.append("replay"), replay())

    monkeypatch.setattr(runner_module, "leave_free", leave_free)
    monkeypatch.setattr(layers, "linear", watched)
    monkeypatch.setattr(FakeCapturer, "capture", captured)
    return seen


@pytest.mark.parametrize(
    ("plan", "sms"),
    [
        (replace(WOVEN, carve_out=True), 8),
        (WOVEN, 0),
        (Plan(40, None, "sharded", carve_out=True), 0),
        (Plan(40), 0),
    ],
)
def test_the_larger_sum_of_a_woven_step_counts(checkpoint, told, plan, sms):
    with LLM(checkpoint("llama"), overlap="off", progress=False, **OPTIONS) as llm:
        told.clear()
        llm._runner.forward(llm._runner.blank_batch(plan.rows), plan)
    assert told == [sms, "GEMMs", "all"]


@pytest.mark.parametrize(("name", "biases"), [("llama", False), ("qwen2_window", True)])
def test_gemms_with_biases_are_told_as_well(checkpoint, monkeypatch, name, biases):
    given: list[Any] = []
    monkeypatch.setattr(runner_module, "leave_free", lambda *which: given.append(which) or nullcontext())
    with LLM(checkpoint(name), overlap="off", progress=False, **OPTIONS) as llm:
        llm._runner.forward(llm._runner.blank_batch(40), replace(WOVEN, carve_out=True))
    assert given == [(8, torch.device("cpu"), biases)]


def test_an_error_in_mid_step_is_no_exception(checkpoint, told, monkeypatch):
    def fail(*_: Any) -> None:
        raise MemoryError("in mid-step")

    with LLM(checkpoint("llama"), overlap="off", progress=False, **OPTIONS) as llm:
        told.clear()
        monkeypatch.setattr(layers.Mlp, "__call__", fail)
        with pytest.raises(MemoryError, match="in mid-step"):
            llm._runner.forward(llm._runner.blank_batch(40), replace(WOVEN, carve_out=True))
    assert told == [8, "GEMMs", "all"]


def test_a_graph_is_captured_inside_and_is_of_that_carve_out_alone(checkpoint, told):
    with LLM(checkpoint("llama"), overlap="off", progress=False, **OPTIONS) as llm, captured_runner(llm._runner):
        for plan in [replace(WOVEN, carve_out=True), WOVEN] * TIMES:
            llm._runner.forward(llm._runner.blank_batch(plan.rows), plan)
    starts = [i for i, what in enumerate(told) if what == "capture"]
    assert [told[i + 1 : i + 5] for i in starts] == [[sms, "GEMMs", "all", "captured"] for sms in (8, 0)]
    assert told[-2:] == ["replay", "replay"]


@pytest.mark.parametrize(
    ("device", "sums", "obstacle", "carves"),
    [
        ("cuda", "multimem", "", True),
        ("cuda", "peer", "", True),
        ("cuda", "sharded", "", False),  # by NCCL, on SMs of its own choice
        ("cuda", "peer", "no cuBLAS", False),
        ("cpu", "sharded", "", False),
    ],
)
def test_who_can_tell(monkeypatch, device, sums, obstacle, carves):
    monkeypatch.setattr(runner_module, "why_not", lambda: obstacle)
    one = SimpleNamespace(
        ranks=SimpleNamespace(device=torch.device(device)),
        communicator=SimpleNamespace(choice=SimpleNamespace(implementation=sums)),
    )
    assert runner_module.Runner.carves.fget(one) == carves


def generate_carved(folder: Path, overlap: str) -> tuple[bool, list[Plan]]:
    """On a rank, as if a carve-out had been measured to pay: whether that was asked, and the plans of real requests."""
    asked = mock.Mock(return_value=True)
    with mock.patch.object(rank_module, "measure_carve_out", asked):
        plans = watched_generate(folder, prompt_batch(0, (20, 9)), GREEDY, OPTIONS | {"overlap": overlap}).plans
    return asked.called, plans


@pytest.mark.parametrize("overlap", ["off", "fused", "weave"])
def test_every_rank_runs_what_rank_0_found(ranks, checkpoint, overlap):
    for asked, plans in ranks(2).run(generate_carved, checkpoint("llama"), overlap):
        assert asked == (overlap == "weave")
        assert [plan.carve_out for plan in plans] == [plan.cut is not None for plan in plans]
        assert any(plan.carved_sms for plan in plans) == (overlap == "weave")


class CarvingStepper(Stepper):
    """Without ranks: takes the time that a test gives."""

    most_rows = 64

    def __init__(self, carves: bool, carved_s: float):
        runner = SimpleNamespace(carves=carves, graphs=None, blank_batch=lambda rows: None)
        self.rank = SimpleNamespace(runner=runner)
        self.carved_s, self.plans, self._warm = carved_s, [], set()

    def plan_seconds(self, plan: Plan) -> float:
        self.plans.append(plan)
        return self.carved_s if plan.carve_out else 1.0


@pytest.mark.parametrize(("carves", "carved_s", "told"), [(True, 0.5, True), (True, 1.5, False), (False, 0.5, False)])
def test_plans_are_tuned_as_they_will_run(carves, carved_s, told):
    stepper = CarvingStepper(carves, carved_s)
    for rows in (32, 64):
        stepper.seconds((rows, Choice("weave", 16, 2, 4)))
        assert stepper.plans[-1].carve_out == told
    assert len(stepper.plans) == 4 + (2 * (WARM_UPS + REPEATS) if carves else 0)
