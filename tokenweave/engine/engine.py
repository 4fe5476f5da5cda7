"""Engine: rank 0 schedules, plans and tells; every rank runs."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tokenweave.comm.group import Ranks
from tokenweave.config import EngineConfig
from tokenweave.cost.planner import Planner
from tokenweave.engine.batch import Batch
from tokenweave.engine.fetch import Fetch
from tokenweave.engine.histories import Slots
from tokenweave.engine.kv_cache import BlockPool
from tokenweave.engine.memory import explained
from tokenweave.engine.prompts import Limits
from tokenweave.engine.request import Completion, Prompt, RequestState, start_request
from tokenweave.engine.runner import Runner
from tokenweave.engine.sampler import RowLogprobs, Sampled, SamplingRow, sample
from tokenweave.engine.scheduler import Scheduled, Scheduler
from tokenweave.engine.vocabulary import Vocabulary
from tokenweave.weave.plan import Plan

LOWER = "lower gpu_memory_utilization, which leaves more beside the KV cache, or max_num_batched_tokens"


@dataclass(frozen=True)
class Step:
    """What rank 0 tells the others to run: small integers, and how to draw each token."""

    batch: Batch
    plan: Plan
    rows: tuple[SamplingRow, ...]  # one for each row that makes logits


def run_step(runner: Runner, step: Step, previous: Sampled | None = None) -> Sampled:
    """The same on every rank: forward, then draw from the gathered logits, which gives every rank the same tokens.

    previous: of the step before, whose tokens may be late. On CUDA this comes back when everything is queued.
    Raises MemoryError with the numbers where a GPU's memory runs out.
    """
    token_ids = None if previous is None else previous.token_ids
    with explained(f"a step of {step.batch.rows} rows", LOWER, runner.meter):
        logits = runner.forward(step.batch, step.plan, token_ids)
        return sample(logits, step.rows, token_ids, runner.histories)


@dataclass(frozen=True)
class Launched:
    """A step on its way: the completions that get a token from it, what it draws, and the copy of that to the host."""

    drawing: list[tuple[RequestState, Completion]]
    sampled: Sampled
    copy: Fetch

    def wait(self) -> list[tuple[int, RowLogprobs | None]]:
        """Per completion its token and log-probabilities. The one wait for the device in all of a step, and bounded.

        Raises PeerError where a sum gave up on a rank.
        """
        return self.sampled.holding(self.copy.wait()).read()


Running = dict[int, tuple[RequestState, Completion]]  # by the id of the completion's sequence


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
        self.slots = Slots()
        self.requests_seen = 0
        asked = config.async_scheduling
        self.overlapped = ranks.device.type == "cuda" if asked is None else asked
        self.sampled: Sampled | None = None  # of the last step

    def run(self, prompts: list[Prompt]) -> Generator[list[RequestState], None, None]:
        """Generate for all prompts. First yields every request, then after each step those that got tokens."""
        requests = [self._start(prompt) for prompt in prompts]
        running = {id(one.sequence): (request, one) for request in requests for one in request.completions}
        yield requests
        try:
            yield from (self._overlapped if self.overlapped else self._plain)(running)
        finally:
            for _, completion in running.values():
                if completion.finish_reason is None:
                    self._end(completion)

    def _plain(self, running: Running) -> Iterator[list[RequestState]]:
        """Launch a step, take in its tokens."""
        while (launched := self._launch(running)) is not None:
            yield self._take_in(launched)

    def _overlapped(self, running: Running) -> Iterator[list[RequestState]]:
        """Launch a step before the tokens of the one before it are taken in: while those are computed."""
        launched = self._launch(running)
        while launched is not None:
            following = self._launch(running)
            yield self._take_in(launched)
            launched = following

    def _launch(self, running: Running) -> Launched | None:
        """Schedule, describe, send, run. None if there is nothing left to run."""
        if not self.scheduler.busy:
            return None
        scheduled = self.scheduler.schedule()
        step, drawing = self._describe(scheduled, running)
        self.scheduler.launched(scheduled)
        self.ranks.send(step)
        self.sampled = run_step(self.runner, step, self.sampled)
        return Launched(drawing, self.sampled, self.runner.fetch(self.sampled.tensors))

    def _describe(
        self, scheduled: list[Scheduled], running: Running
    ) -> tuple[Step, list[tuple[RequestState, Completion]]]:
        """The step as every rank needs it, and the completions that get a token from it."""
        spans = [one.sequence.span(one.count) for one in scheduled]
        batch = Batch(tuple(spans), late_rows(scheduled))
        owners = [running[id(one.sequence)] for one in scheduled]
        drawing = [owner for owner, span in zip(owners, spans, strict=True) if span.wanted]
        rows = [completion.every_row or self._row(completion) for _, completion in drawing]
        for (request, _), span in zip(owners, spans, strict=True):
            if request.first_scheduled_s is None:
                note_start(request, span.context)
        for at, (_, completion) in enumerate(drawing):
            completion.sequence.drawn_at = at
        return Step(batch, self.planner.plan(spans), tuple(rows)), drawing

    def _take_in(self, launched: Launched) -> list[RequestState]:
        """Wait for a step's tokens and pass them on. A text that has ended meanwhile wants none."""
        drawn, now_s = launched.wait(), time.monotonic()
        wanting = []
        for (request, completion), (token_id, logprobs) in zip(launched.drawing, drawn, strict=True):
            completion.sequence.late -= 1
            if completion.finish_reason is None:
                completion.push(token_id, logprobs)
                self._note(request, completion, now_s)
                wanting.append(request)
        return list(dict.fromkeys(wanting))

    def _note(self, request: RequestState, completion: Completion, now_s: float) -> None:
        """A token is out."""
        request.first_token_s = request.first_token_s or now_s
        if completion.finish_reason is not None:
            self._end(completion)
            if request.finished:
                request.finished_s = now_s

    def _row(self, completion: Completion) -> SamplingRow:
        if completion.params.penalised and completion.slot is None:
            completion.slot = self.slots.take()
        return completion.row()

    def _end(self, completion: Completion) -> None:
        """It wants no more tokens."""
        self.scheduler.finish(completion.sequence)
        if completion.slot is not None:
            self.slots.give_back(completion.slot)

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


def note_start(request: RequestState, cached_tokens: int) -> None:
    """Keep when a request was first scheduled, and how much of it was cached then."""
    request.first_scheduled_s = time.monotonic()
    request.cached_tokens = cached_tokens


def late_rows(scheduled: list[Scheduled]) -> tuple[tuple[int, int], ...]:
    """As Batch.late: (row, place among the tokens that the step before draws) of each token that is not known yet."""
    rows = zip(accumulate([one.count for one in scheduled]), scheduled, strict=True)
    return tuple([(stop - 1, one.sequence.drawn_at) for stop, one in rows if one.sequence.late])


def follow(runner: Runner, ranks: Ranks) -> Iterator[Any]:
    """The other ranks' main loop: run what rank 0 says, yield whatever else it sends.

    Tokens stay on the device: only rank 0 ever waits for it, so it is rank 0 that hears of a step that does not end.
    """
    sampled: Sampled | None = None
    while True:
        message = receive(runner, ranks)
        if isinstance(message, Step):
            sampled = run_step(runner, message, sampled)
        else:
            yield message


def receive(runner: Runner, ranks: Ranks) -> Any:
    """The next message of rank 0. Where that is gone, what this rank's own sums have to report says more."""
    try:
        return ranks.receive()
    except RuntimeError:
        runner.check()
        raise
