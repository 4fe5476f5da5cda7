"""Whatever the lanes' speeds, the numbers are the same bit for bit: the order is in the code, not in the timing."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import prompt_batch
from tests.weave.faults import shared_buffers
from tests.weave.steps import SCENES, play, scene_runner
from tokenweave import LLM, SamplingParams
from tokenweave.engine.runner import Runner
from tokenweave.weave.lanes import Job, Observer

LONGEST_S = 0.004
SEEDS = (0, 1, 2)


class RandomDelays(Observer):
    """Sleeps at every second hook or so: compute before it submits and before it waits, comm before and after a job."""

    def __init__(self, seed: int):
        self.compute, self.comm = random.Random(2 * seed), random.Random(2 * seed + 1)  # a thread each

    def submitted(self, job: Job) -> None:
        self._sleep(self.compute)

    def waiting(self, job: Job) -> None:
        self._sleep(self.compute)

    def started(self, job: Job) -> None:
        self._sleep(self.comm)

    def finished(self, job: Job) -> None:
        self._sleep(self.comm)

    @staticmethod
    def _sleep(draw: random.Random) -> None:
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0.0, LONGEST_S))


class Latest(Observer):
    """The slowest comm lane there can be: a job starts only when the compute lane has come to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[int, threading.Event] = {}

    def waiting(self, job: Job) -> None:
        self._event(job).set()

    def started(self, job: Job) -> None:
        assert self._event(job).wait(30), "nobody came to wait for this job"

    def _event(self, job: Job) -> threading.Event:
        with self._lock:
            return self._events.setdefault(id(job.run), threading.Event())


class Earliest(Observer):
    """The fastest comm lane there can be: compute goes on only when all that was submitted is done."""

    def __init__(self) -> None:
        self._done = threading.Condition()
        self._in_flight = 0

    def submitted(self, job: Job) -> None:
        with self._done:
            assert self._done.wait_for(lambda: self._in_flight == 0, 30), "the comm lane is stuck"
            self._in_flight += 1

    def finished(self, job: Job) -> None:
        with self._done:
            self._in_flight -= 1
            self._done.notify()


def schedules(rank: int) -> dict[str, Observer]:
    """Random ones differ between ranks as well."""
    delays = {f"delays {seed}": RandomDelays(10 * seed + rank) for seed in SEEDS}
    return {"earliest": Earliest(), "latest": Latest(), **delays}


def logits_by_schedule(folder: Path, form: str, scenes: list[str]) -> dict[tuple[str, str], list[torch.Tensor]]:
    """On a rank: {(scene, schedule): its steps' logits}; schedule "" is the one that comes by itself."""
    logits = {}
    with scene_runner(folder) as runner:
        for name in scenes:
            logits[name, ""] = play(runner, SCENES[name], form)
            for schedule, observer in schedules(runner.ranks.rank).items():
                runner.lane.observers = (observer,)
                logits[name, schedule] = play(runner, SCENES[name], form)
            runner.lane.observers = ()
    return logits


@pytest.mark.parametrize("form", ["reference", "sharded"])
def test_logits_under_any_schedule(ranks, checkpoint, form):
    scenes = ["prefill", "mixed", "cut in a chunk", "odd rows"]
    by_rank = ranks(2).run(logits_by_schedule, checkpoint("llama"), form, scenes)
    expected = {name: by_rank[0][name, ""] for name in scenes}
    for logits in by_rank:
        assert len(logits) == len(scenes) * (1 + 2 + len(SEEDS))
        for (name, schedule), steps in logits.items():
            for step, reference in zip(steps, expected[name], strict=True):
                assert reference.isfinite().all()
                assert torch.equal(step, reference), (name, schedule)


def tokens_by_schedule(folder: Path) -> dict[str, list[list[int]]]:
    """On a rank: {schedule: the tokens of each request}, through the API; sampled, with prompts that take several steps."""
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=8, ignore_eos=True)
    with LLM(folder, overlap="weave", max_num_batched_tokens=24, block_size=4, progress=False) as llm:
        runner: Runner = llm._runner
        tokens = {}
        for schedule, observer in {"": Observer(), **schedules(runner.ranks.rank)}.items():
            runner.lane.observers = (observer,)
            runner.storage.fill_(float("nan"))
            outputs: Any = llm.generate(prompt_batch(0, (1, 30, 7, 18)), params)
            tokens[schedule] = [output.outputs[0].token_ids for output in outputs]
    return tokens


def test_tokens_under_any_schedule(ranks, checkpoint):
    one, other = ranks(2).run(tokens_by_schedule, checkpoint("llama"))
    assert one == other
    assert one == dict.fromkeys(one, one[""])
    assert [len(tokens) for tokens in one[""]] == [8] * 4


def faulty_logits(folder: Path, form: str) -> tuple[bool, bool]:
    """On a rank: whether logits stay equal with shared buffers, on the earliest and on the latest schedule."""
    equal = []
    with scene_runner(folder) as runner:
        (expected,) = play(runner, SCENES["prefill"], form)
        for schedule in (Earliest(), Latest()):
            runner.lane.observers = (schedule,)
            with shared_buffers(runner):
                equal.append(torch.equal(play(runner, SCENES["prefill"], form)[0], expected))
    return equal[0], equal[1]


def test_a_shared_buffer_shows_on_the_latest_schedule(ranks, checkpoint):
    """These tests can fail: the fault goes unseen when the comm lane is quick, and not when it is slow."""
    assert ranks(2).run(faulty_logits, checkpoint("llama"), "reference") == [(True, False)] * 2
