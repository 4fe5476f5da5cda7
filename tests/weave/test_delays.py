"""Whatever the lanes' speeds, the numbers are the same bit for bit: the order is in the code, not in the timing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.checkpoints import prompt_batch
from tests.weave.faults import shared_partials
from tests.weave.steps import SCENES, play, scene_runner
from tokenweave import LLM, SamplingParams
from tokenweave.engine.runner import Runner
from tokenweave.weave.lanes import Job, Observer, ThreadLane, ThreadPending

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
        self._wanted: dict[Job, threading.Event] = {}

    def waiting(self, job: Job) -> None:
        self._event(job).set()

    def started(self, job: Job) -> None:
        if not self._event(job).wait(30):
            raise TimeoutError("nobody came to wait for this job")

    def _event(self, job: Job) -> threading.Event:
        with self._lock:
            return self._wanted.setdefault(job, threading.Event())


@contextmanager
def earliest() -> Iterator[None]:
    """The fastest comm lane there can be: a job is done before the compute lane goes on."""
    submit = ThreadLane.submit

    def at_once(lane: ThreadLane, run: Callable[[], Any], **words: Any) -> ThreadPending:
        pending = submit(lane, run, **words)
        pending.drain()
        return pending

    with patch.object(ThreadLane, "submit", at_once):
        yield


def observed(runner: Runner, observer: Observer) -> AbstractContextManager[Any]:
    return patch.object(runner.lane, "observers", (observer,))


def schedules(runner: Runner) -> dict[str, AbstractContextManager[Any]]:
    """How the lanes may run; the random ones differ between ranks as well."""
    extremes = {"as it comes": nullcontext(), "earliest": earliest(), "latest": observed(runner, Latest())}
    delays = {seed: RandomDelays(10 * seed + runner.ranks.rank) for seed in SEEDS}
    return extremes | {f"delays {seed}": observed(runner, observer) for seed, observer in delays.items()}


def logits_by_schedule(folder: Path, form: str, scenes: list[str]) -> dict[tuple[str, str], list[torch.Tensor]]:
    """On a rank: {(scene, schedule): the logits of its steps}."""
    logits = {}
    with scene_runner(folder) as runner:
        for name in scenes:
            for schedule, in_force in schedules(runner).items():
                with in_force:
                    logits[name, schedule] = play(runner, SCENES[name], form)
    return logits


@pytest.mark.parametrize("form", ["reference", "sharded"])
def test_logits_under_any_schedule(ranks, checkpoint, form):
    scenes = ["prefill", "mixed", "cut in a chunk", "odd rows"]
    by_rank = ranks(2).run(logits_by_schedule, checkpoint("llama"), form, scenes)
    expected = {name: by_rank[0][name, "as it comes"] for name in scenes}
    assert all(step.isfinite().all() for steps in expected.values() for step in steps)
    for logits in by_rank:
        assert len(logits) == len(scenes) * (3 + len(SEEDS))
        for (name, schedule), steps in logits.items():
            for step, reference in zip(steps, expected[name], strict=True):
                assert torch.equal(step, reference), (name, schedule)


def tokens_by_schedule(folder: Path) -> dict[str, list[list[int]]]:
    """On a rank: {schedule: the tokens of each request}, sampled through the API; the prompts take several steps."""
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=8, ignore_eos=True)
    options = {"max_num_batched_tokens": 24, "block_size": 4, "enable_prefix_caching": False, "progress": False}
    tokens = {}
    with LLM(folder, overlap="weave", **options) as llm:
        for schedule, in_force in schedules(llm._runner).items():
            llm._runner.storage.fill_(float("nan"))
            with in_force:
                outputs: Any = llm.generate(prompt_batch(0, (1, 30, 7, 18)), params)
            tokens[schedule] = [output.outputs[0].token_ids for output in outputs]
    return tokens


def test_tokens_under_any_schedule(ranks, checkpoint):
    one, other = ranks(2).run(tokens_by_schedule, checkpoint("llama"))
    assert one == other
    assert one == dict.fromkeys(one, one["as it comes"])
    assert [len(set(tokens)) > 1 for tokens in one["as it comes"]] == [True] * 4  # NaN would repeat one token


def faulty_logits(folder: Path) -> list[bool]:
    """On a rank: whether logits stay equal when partials share a buffer, on the earliest and on the latest schedule."""
    with scene_runner(folder) as runner:
        (expected,) = play(runner, SCENES["prefill"], "reference")
        equal = []
        for in_force in (earliest(), observed(runner, Latest())):
            with in_force, shared_partials(runner):
                (logits,) = play(runner, SCENES["prefill"], "reference")
            equal.append(torch.equal(logits, expected))
    return equal


def test_a_shared_buffer_shows_on_the_latest_schedule(ranks, checkpoint):
    """The tests above can fail: the fault goes unseen while the comm lane is quick, and shows once it is slow."""
    assert ranks(2).run(faulty_logits, checkpoint("llama")) == [[True, False]] * 2
