"""Stepper: real steps of a model under plans that the caller chooses, timed."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property

from tokenweave.comm.group import leave_default_group
from tokenweave.config import EngineConfig
from tokenweave.cost.choice import Choice
from tokenweave.cost.measure import carving_pays
from tokenweave.cost.planner import plan_of
from tokenweave.engine.engine import Step, follow, run_step
from tokenweave.engine.messages import Done, finish_call
from tokenweave.engine.rank import open_rank
from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.engine.workers import start_workers
from tokenweave.weave.plan import Plan


class Stepper:
    """A model on its ranks. Rank 0 asks for `seconds`, every other rank calls `follow`; then all `close`.

    Opened like an LLM: under torchrun by every rank, in a plain process with the workers that it starts.
    """

    def __init__(self, config: EngineConfig):
        self._workers = workers = start_workers(config)
        meeting, watch = (workers.meeting, workers.check) if workers else (None, None)
        self._warm: set[tuple[int, str]] = set()
        try:
            self.rank = open_rank(config, meeting, watch=watch)
            if workers is not None:
                workers.wake()
        except BaseException:
            self._stop(force=True)
            raise

    @property
    def leads(self) -> bool:
        return self.rank.ranks.rank == 0

    @property
    def most_rows(self) -> int:
        """The largest step that the cache, the step budget and the model's length have room for."""
        runner = self.rank.runner
        capacity = len(runner.storage) * runner.config.block_size
        return min(capacity, runner.config.max_num_batched_tokens, runner.max_model_len)

    @cached_property
    def carve_out(self) -> bool:
        """Of woven plans, as an LLM decides it when it starts: measured when it is first asked for."""
        return self.rank.runner.carves and carving_pays(self.plan_seconds, self.most_rows)

    def seconds(self, case: tuple[int, Choice]) -> float:
        """Of one step of a prompt of so many rows: forward and sampling, on rank 0's clock. The first of a kind warms
        up what is allocated or compiled then, and one that is captured is launched. Uses the cache's first blocks."""
        rows, choice = case
        plan = replace(plan_of(choice, rows, "tuning"), carve_out=self.carve_out)
        if (rows, choice.mode) not in self._warm:
            self._warm.add((rows, choice.mode))
            self.plan_seconds(plan)
        graphs, batch = self.rank.runner.graphs, self.rank.runner.blank_batch(rows)
        while graphs is not None and not graphs.settled(batch, plan):
            self.plan_seconds(plan)
        return self.plan_seconds(plan)

    def plan_seconds(self, plan: Plan) -> float:
        """The same under any plan, without a run to warm up."""
        ranks, runner = self.rank.ranks, self.rank.runner
        step = Step(runner.blank_batch(plan.rows), plan, (SamplingRow(),))
        ranks.send(step)
        start_s = time.perf_counter()
        run_step(runner, step)
        runner.synchronize()
        return time.perf_counter() - start_s

    def follow(self) -> None:
        """Run what rank 0 runs, until it is done."""
        for message in follow(self.rank.runner, self.rank.ranks):
            if finish_call(message, self.rank.runner, self.rank.ranks):
                return

    def close(self, failed: bool = False) -> None:
        """failed: the ranks may be in mid-step."""
        if self.leads and not failed:
            self.rank.ranks.send(Done([]))
        if failed:
            self.rank.abort("it failed")
        if self._workers is not None:
            self._workers.stop(force=True) if failed else self._workers.dismiss()
        self.rank.close(failed)  # before the default group: it destroys groups that depend on it
        self._stop()

    def _stop(self, force: bool = False) -> None:
        if self._workers is not None:
            self._workers.stop(force=force)
            leave_default_group()
