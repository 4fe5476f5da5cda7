"""Engine: rank 0 schedules, plans and tells; every rank runs."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from tokenweave.comm.group import Ranks
from tokenweave.config import EngineConfig
from tokenweave.cost.planner import Planner
from tokenweave.engine.batch import Batch
from tokenweave.engine.kv_cache import BlockPool
from tokenweave.engine.prompts import Limits
from tokenweave.engine.request import Completion, Prompt, RequestState, start_request
from tokenweave.engine.runner import Runner
from tokenweave.engine.sampler import Sampled, SamplingRow, sample
from tokenweave.engine.scheduler import Scheduled, Scheduler
from tokenweave.engine.vocabulary import Vocabulary
from tokenweave.weave.plan import Plan


@dataclass(frozen=True)
class Step:
    """What rank 0 tells the others to run: small integers, and how to draw each token."""

    batch: Batch
    plan: Plan
    rows: tuple[SamplingRow, ...]  # one for each row that makes logits


def run_step(runner: Runner, step: Step) -> Sampled:
    """The same on every rank: forward, then draw from the gathered logits, which gives every rank the same tokens."""
    logits = runner.forward(step.batch, step.plan)
    runner.check()
    return sample(logits, step.rows)


class Engine:
    """Rank 0's side: requests in, tokens out. `run` is the main loop."""

    def __init__(
        self,
        config: EngineConfig,
        ranks: Ranks,
        runner: Runner,
        vocabulary: Vocabulary,
        planner: Planner,
    ):
        self.config = config
        self.ranks = ranks
        self.runner = runner
        self.vocabulary = vocabulary
        self.planner = planner
        pool = BlockPool(len(runner.storage), config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(pool, config.max_num_batched_tokens, config.max_num_seqs, config.policy)
        self.limits = Limits(runner.spec.vocab_size, runner.max_model_len, pool.num_blocks * config.block_size)
        self.requests_seen = 0

    def run(self, prompts: list[Prompt]) -> Generator[list[RequestState], None, None]:
        """Generate for all prompts. First yields every request, then after each step those that got tokens."""
        requests = [self._start(prompt) for prompt in prompts]
        running = {id(one.sequence): (request, one) for request in requests for one in request.completions}
        yield requests
        try:
            while self.scheduler.busy:
                yield self._step(running)
        finally:
            for _, completion in running.values():
                if completion.finish_reason is None:
                    self.scheduler.finish(completion.sequence)

    def _step(self, running: dict[int, tuple[RequestState, Completion]]) -> list[RequestState]:
        """Schedule, run, take in."""
        scheduled = self.scheduler.schedule()
        for one in scheduled:
            note_start(running[id(one.sequence)][0], one)
        step, drawing = self._describe(scheduled, running)
        self.ranks.send(step)
        sampled = run_step(self.runner, step)
        self.scheduler.computed(scheduled)
        return self._take_in(drawing, sampled)

    def _describe(
        self, scheduled: list[Scheduled], running: dict[int, tuple[RequestState, Completion]]
    ) -> tuple[Step, list[tuple[RequestState, Completion]]]:
        """The step as every rank needs it, and the completions that get a token from it."""
        batch = Batch(tuple(one.sequence.span(one.count) for one in scheduled))
        wanting = zip(scheduled, batch.spans, strict=True)
        drawing = [running[id(one.sequence)] for one, span in wanting if span.wanted]
        plan = self.planner.plan(batch.spans)
        return Step(batch, plan, tuple(completion.row() for _, completion in drawing)), drawing

    def _take_in(self, drawing: list[tuple[RequestState, Completion]], sampled: Sampled) -> list[RequestState]:
        now_s = time.monotonic()
        for (request, completion), token_id, logprobs in zip(
            drawing, sampled.token_ids.tolist(), sampled.logprobs, strict=True
        ):
            completion.push(token_id, logprobs)
            request.first_token_s = request.first_token_s or now_s
            if completion.finish_reason is not None:
                self.scheduler.finish(completion.sequence)
            if request.finished:
                request.finished_s = now_s
        return list(dict.fromkeys(request for request, _ in drawing))

    def _start(self, prompt: Prompt) -> RequestState:
        request = start_request(self.requests_seen, prompt, self._salt(prompt), self.config.seed, self.vocabulary)
        self.requests_seen += 1
        for completion in request.completions:
            self.scheduler.add(completion.sequence)
        return request

    def _salt(self, prompt: Prompt) -> int:
        """Dynamic rope rotates a long prompt by its length: its keys are of no use to prompts of another length."""
        spec = self.runner.spec
        dynamic = spec.rope.get("rope_type") == "dynamic" and len(prompt.token_ids) > spec.max_position
        return len(prompt.token_ids) if dynamic else 0


def note_start(request: RequestState, scheduled: Scheduled) -> None:
    """Keep when a request was first scheduled, and how much of it was cached then."""
    if request.first_scheduled_s is None:
        request.first_scheduled_s = time.monotonic()
        request.cached_tokens = scheduled.sequence.computed


def follow(runner: Runner, ranks: Ranks) -> Iterator[Any]:
    """The other ranks' main loop: run what rank 0 says, yield whatever else it sends."""
    while True:
        message = ranks.receive()
        if isinstance(message, Step):
            run_step(runner, message)
        else:
            yield message
