"""The planner that a rank opens: what was tuned or calibrated on this machine is picked up by itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.capture import captured_runner
from tests.checkpoints import prompt_batch
from tests.runtime import watched_generate
from tokenweave import LLM, SamplingParams
from tokenweave.comm.link import Link
from tokenweave.cost.choice import Choice
from tokenweave.cost.machine import calibration_path
from tokenweave.cost.tuned import Store, TunedStep
from tokenweave.engine.at_hand import key_of
from tokenweave.engine.planning import open_planner
from tokenweave.weave.plan import Plan

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
PROMPTS = prompt_batch(0, (40,))
OPTIONS = {"dtype": "float32", "num_kv_blocks": 64, "device": "cpu", "link": Link(1e9)}


def generate_as_tuned(folder: Path, cache: Path) -> list[Plan]:
    with mock.patch.dict(os.environ, TOKENWEAVE_CACHE=str(cache)):
        with LLM(folder, progress=False, overlap="off", **OPTIONS) as llm:
            if llm._ranks.rank == 0:
                Store().write_step(key_of(llm._runner), TunedStep(40, Choice("weave", 13, 2, 8), 1.0, "off", 2.0))
        with LLM(folder, progress=False, overlap="auto", **OPTIONS) as llm:
            leads = llm._ranks.rank == 0
            assert llm.plans == ("what was tuned at 40 rows" if leads else "what rank 0 knows")
        return watched_generate(folder, PROMPTS, GREEDY, OPTIONS | {"overlap": "auto"}).plans


def test_a_tuned_plan_is_run(ranks, checkpoint, tmp_path):
    for plans in ranks(2).run(generate_as_tuned, checkpoint("llama"), tmp_path):
        assert plans[0] == Plan(40, 13, "sharded", "tuned on this machine for about 40 rows", 2, 8)
        assert plans[-1].cut is None  # one row, for which nothing was tuned


def start_with_a_broken_calibration(folder: Path, cache: Path) -> str:
    refused = r"cannot be used: .*; delete it and run `tokenweave calibrate` again"
    with mock.patch.dict(os.environ, TOKENWEAVE_CACHE=str(cache)):
        path = calibration_path(torch.device("cpu"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
        with pytest.raises(ValueError, match=refused) as caught:
            LLM(folder, progress=False, overlap="auto", **OPTIONS)
    return str(caught.value)


def test_a_broken_calibration_is_refused_by_name_on_every_rank(ranks, checkpoint, tmp_path):
    for said in ranks(2).run(start_with_a_broken_calibration, checkpoint("llama"), tmp_path):
        assert str(tmp_path / "calibration") in said


def plans_by_captured_costs(folder: Path) -> list[bool]:
    """On a rank: where attention can be captured, and where it cannot."""
    with LLM(folder, progress=False, overlap="weave", **OPTIONS) as llm, captured_runner(llm._runner):
        runner, found = llm._runner, []
        for backend in (runner.attention.captured, None):
            vars(runner).pop("graphs", None)
            runner.attention = replace(runner.attention, captured=backend)
            found.append(open_planner(runner, None, False).captured is not None)
        return found


def test_steps_are_planned_as_captured_only_where_they_are(ranks, checkpoint):
    assert ranks(2).run(plans_by_captured_costs, checkpoint("llama")) == [[True, False], [False, False]]
