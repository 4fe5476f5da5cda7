"""LLM: the public API."""

from __future__ import annotations

import atexit
import contextlib
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tokenweave.comm.choice import Choice
from tokenweave.comm.group import PeerError, is_lost_peer, leave_default_group
from tokenweave.config import OVERLAPS, EngineConfig, one_of
from tokenweave.engine.engine import Engine, follow
from tokenweave.engine.memory import Memory
from tokenweave.engine.messages import Accepted, Done, Emit, Message, collect_spans
from tokenweave.engine.prompts import Limits, accept, as_conversations
from tokenweave.engine.rank import Rank, open_rank
from tokenweave.engine.request import Prompt
from tokenweave.engine.vocabulary import read_vocabulary
from tokenweave.engine.workers import Workers, start_workers
from tokenweave.keywords import check_keywords
from tokenweave.outputs import RequestOutput
from tokenweave.progress import Progress
from tokenweave.trace.overlap import OverlapSummary, summary
from tokenweave.trace.spans import Span
from tokenweave.waiting import EXIT_S, ending_within

Call = Generator[Message, None, None]


class LLM:
    """A model that generates text, over all ranks that torchrun started, or over those it starts itself.

    Under torchrun every rank makes the same calls and gets the same outputs. In a plain process
    `tensor_parallel_size=N` starts N-1 other ranks on this host; the caller is rank 0.

    model: a Hugging Face folder or hub id. options: see tokenweave.config.EngineConfig.
    Raises ValueError or TypeError for options and models that cannot be, on every rank.
    """

    def __init__(self, model: str | Path, **options: Any):
        check_keywords("LLM", options, (field.name for field in fields(EngineConfig)))
        self.config = EngineConfig(model=str(model), **options)
        self.spans: list[Span] = []  # of all calls so far, when `trace` is set
        self._closed: str | None = None
        self._call: Call = no_call()
        self._threads = torch.get_num_threads()
        self._workers: Workers | None = None
        self._rank: Rank | None = None
        with self._shut_on_failure("it could not be opened"):
            self._open()

    def _open(self) -> None:
        self._workers = workers = start_workers(self.config)
        meeting, watch = (workers.meeting, workers.check) if workers else (None, None)
        self._rank = rank = open_rank(self.config, meeting, watch=watch)
        self._ranks, self._runner = rank.ranks, rank.runner
        self._planner = rank.planner
        self._plans = rank.planner.basis if rank.ranks.rank == 0 else "what rank 0 knows"
        vocabulary = read_vocabulary(rank.folder, rank.hf_config)
        self.tokenizer = vocabulary.tokenizer
        atexit.register(close_at_exit, weakref.ref(self))
        self._engine = Engine(self.config, rank.ranks, rank.runner, vocabulary, rank.planner)

    @property
    def world_size(self) -> int:
        """How many ranks share the model."""
        return self._ranks.world_size

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._ranks.device

    @property
    def comm(self) -> Choice:
        """What forms the sums of `overlap` "fused" and "weave", and why it was chosen."""
        return self._runner.communicator.choice

    @property
    def plans(self) -> str:
        """What rank 0, which plans for all, goes by; for people."""
        return self._plans

    @property
    def memory(self) -> Memory:
        """What this rank's memory is for; str() is a line for people."""
        return self._runner.memory

    @property
    def limits(self) -> Limits:
        """What a request must stay within: the vocabulary, the model's length, the KV cache."""
        return self._engine.limits

    def plan_by(self, overlap: str) -> None:
        """From the next call on, run as this `overlap` says, to compare them on one model; of an LLM of overlap="auto",
        which is ready for all. Raises ValueError for another, and for what is no overlap."""
        one_of("overlap", overlap, OVERLAPS)
        if overlap != self.config.overlap != "auto":
            raise ValueError(f"this LLM was made for overlap={self.config.overlap!r}; make it with overlap='auto'")
        self._engine.planner = self._planner.under(overlap)

    # -- generating ------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, stream: bool = False
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Complete prompts: a str, list[str], list[int] (token ids) or list[list[int]].

        sampling_params: a SamplingParams for all prompts, or a list with one for each.
        Returns a RequestOutput for each prompt, in order. stream=True: an iterator of RequestOutputs, each with
        everything so far of a request that got tokens in a step; a new call ends an iterator that is not exhausted, and
        so does a pause longer than timeout_s between two of its items.
        Raises ValueError or TypeError for a bad request, on every rank, before any work starts. Only rank 0's
        arguments count. Raises PeerError where another rank has failed or gone; this LLM is then closed.
        """
        return self._begin(lambda: prompts, sampling_params, stream)

    def chat(
        self, messages: Any, sampling_params: Any = None, *, stream: bool = False, **template_options: Any
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Complete conversations: a list of {"role", "content"}, or a list of such lists; by the chat template."""
        return self._begin(lambda: self._templated(messages, template_options), sampling_params, stream)

    def _templated(self, messages: Any, template_options: dict[str, Any]) -> list[list[int]]:
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{self.config.model} has no chat template; use generate with text of your own form")
        options = {"add_generation_prompt": True, "tokenize": False} | template_options
        texts = [self.tokenizer.apply_chat_template(one, **options) for one in as_conversations(messages)]
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def _begin(
        self, prompts: Callable[[], Any], params: Any, stream: bool
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Start a call, once its requests are accepted, and run it to its end unless it is streamed."""
        if self._closed is not None:
            raise RuntimeError(f"this LLM cannot be used any more: {self._closed}; make a new one")
        self._call.close()
        self._call = self._lead(prompts, params, stream) if self._ranks.rank == 0 else self._follow()
        first = next(self._call)
        if isinstance(first, Done) and first.error is not None:
            raise first.error
        if stream:
            return streamed(self._call)
        *_, done = self._call
        assert isinstance(done, Done)
        return done.outputs

    def _lead(self, prompts: Callable[[], Any], params: Any, stream: bool) -> Call:
        """Rank 0's side of a call: everything it yields, it also sends to the other ranks."""
        with self._shut_on_failure("an earlier call failed"):
            if self._workers is not None:
                self._workers.wake()
            try:
                accepted = accept(prompts(), params, self.tokenizer, self._engine.limits)
            except Exception as error:
                yield self._tell(Done([], refusal(error)))
                return
            try:
                yield self._tell(Accepted())
                outputs = yield from self._run(accepted, stream)
            except GeneratorExit:  # the caller had enough
                self._tell(Done([]))
                raise
            yield self._tell(Done(outputs))

    def _run(self, accepted: list[Prompt], stream: bool) -> Generator[Message, None, list[RequestOutput]]:
        steps = self._engine.run(accepted)
        requests = next(steps)
        with contextlib.closing(steps), Progress(requests, self.config.progress and not stream) as progress:
            for changed in steps:
                progress.update()
                if stream and changed:
                    yield self._tell(Emit([request.output() for request in changed]))
        return [request.output() for request in requests]

    def _tell(self, message: Message) -> Message:
        self._ranks.send(message)
        if isinstance(message, Done):
            self._finish_trace()
        return message

    def _follow(self) -> Call:
        """Every other rank's side of a call: what rank 0 sends."""
        messages = follow(self._runner, self._ranks)
        message: Message = Accepted()
        with self._shut_on_failure("an earlier call failed"):
            try:
                while not isinstance(message, Done):
                    message = self._hear(messages)
                    yield message
            except GeneratorExit:  # the caller had enough, on every rank
                while not isinstance(message, Done):
                    message = self._hear(messages)
                raise

    def _hear(self, messages: Iterator[Message]) -> Message:
        message = next(messages)
        if isinstance(message, Done):
            self._finish_trace()
        return message

    @contextlib.contextmanager
    def _shut_on_failure(self, why: str) -> Iterator[None]:
        """What breaks off leaves the ranks out of step: nothing more can be done with them."""
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            if self._rank is not None:
                self._rank.abort(why)
            lost = self._describe_loss() if is_lost_peer(error) else None
            self._shut(why, force=True)
            clear_frames(error)
            if lost is None:
                raise
            raise PeerError(f"another rank was lost: {lost}; make a new LLM") from error

    def _describe_loss(self) -> str:
        return "its output says why" if self._workers is None else self._workers.ended()

    # -- the timeline ----------------------------------------------------------------------------------------------

    def overlap_summary(self) -> OverlapSummary | None:
        """How much communication was hidden, in all calls so far; None unless `trace` was set."""
        return summary(self.spans) if self.config.trace else None

    def _finish_trace(self) -> None:
        if self.config.trace is None:
            return
        self.spans = collect_spans(self._runner, self._ranks)
        if self._ranks.rank == 0 and self.spans:
            from tokenweave.trace import chrome, picture  # here, because matplotlib takes a second to import

            path = Path(self.config.trace)
            chrome.write(self.spans, path)
            picture.draw(self.spans, path.with_suffix(".png"), title=self._title())

    def _title(self) -> str:
        simulated = ", simulated link" if self.config.link else ""
        return f"{Path(self.config.model).name}, W={self._ranks.world_size}, overlap={self.config.overlap}{simulated}"

    # -- closing ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the model, the cache, the process groups, and the ranks that this object started."""
        with contextlib.suppress(PeerError):  # a streamed call ends here, or finds that its ranks have
            self._call.close()
        self._shut("it was closed")

    def _shut(self, why: str, force: bool = False) -> None:
        """force: the ranks are not between calls. Those that this object started are then ended first, so that what
        this rank still waits for fails at once; else they leave together."""
        if self._closed is not None:
            return
        self._closed = why
        if self._workers is not None:
            self._workers.stop(force=True) if force else self._workers.dismiss()
        if self._rank is not None:
            self._rank.close(failed=force)
        if self._workers is not None:
            self._workers.stop()
            leave_default_group()
        torch.set_num_threads(self._threads)
        self._workers, self._rank = None, None
        for name in ("_engine", "_runner", "_ranks"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # at the end of the process, exit handlers and the ends of pipes close everything
            with contextlib.suppress(Exception):  # nobody could catch it
                self.close()


def streamed(call: Call) -> Iterator[RequestOutput]:
    """The outputs of a call as they come. Ending this iterator ends the call."""
    with contextlib.closing(call):
        for message in call:
            if isinstance(message, Emit):
                yield from message.outputs


def close_at_exit(reference: weakref.ref[LLM]) -> None:
    """Close what is still open, while there still are groups and ranks to tell of it."""
    llm = reference()
    if llm is not None:
        with ending_within(EXIT_S):
            llm.close()


def no_call() -> Call:
    """A call that is over."""
    yield from ()


def clear_frames(error: BaseException | None) -> None:
    """Let go of what the functions had in hand through which `error` went. Else the caller who keeps the error keeps
    the model as well, and the connections, whose end is what tells the other ranks."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def refusal(error: Exception) -> Exception:
    """What every rank raises for a request that rank 0 refuses."""
    if type(error) in (ValueError, TypeError):
        return error
    return ValueError(f"the request cannot be used: {type(error).__name__}: {error}")
