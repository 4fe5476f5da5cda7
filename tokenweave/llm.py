"""LLM: the public API."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from tokenweave.comm.group import leave_default_group
from tokenweave.config import EngineConfig
from tokenweave.engine.engine import Engine, follow
from tokenweave.engine.messages import Accepted, Done, Emit, Message, collect_spans
from tokenweave.engine.prompts import accept
from tokenweave.engine.rank import open_rank
from tokenweave.engine.request import Prompt
from tokenweave.engine.vocabulary import read_vocabulary
from tokenweave.engine.workers import start_workers
from tokenweave.outputs import RequestOutput
from tokenweave.progress import Progress
from tokenweave.trace.overlap import OverlapSummary, summary
from tokenweave.trace.spans import Span

Call = Generator[Message, None, None]


class LLM:
    """A model that generates text, over all ranks that torchrun started, or over those it starts itself.

    Under torchrun every rank makes the same calls and gets the same outputs. In a plain process
    `tensor_parallel_size=N` starts N-1 other ranks on this host; the caller is rank 0.

    model: a Hugging Face folder or hub id. options: see tokenweave.config.EngineConfig.
    Raises ValueError or TypeError for options and models that cannot be, on every rank.
    """

    def __init__(self, model: str | Path, **options: Any):
        self.config = EngineConfig(model=str(model), **options)
        self.spans: list[Span] = []  # of all calls so far, when `trace` is set
        self._closed: str | None = None
        self._call: Call = no_call()
        self._threads = torch.get_num_threads()
        self._workers = start_workers(self.config)
        try:
            self._rank = open_rank(self.config, self._workers.meeting if self._workers else None)
        except BaseException:
            self._end_workers(force=True)
            raise
        self._ranks, self._runner = self._rank.ranks, self._rank.runner
        try:
            vocabulary = read_vocabulary(self._rank.folder, self._rank.hf_config)
            self.tokenizer = vocabulary.tokenizer
            self._engine = Engine(self.config, self._ranks, self._runner, vocabulary, self._rank.times)
        except BaseException:
            self.close(force=True)
            raise

    # -- generating ------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, stream: bool = False
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Complete prompts: a str, list[str], list[int] (token ids) or list[list[int]].

        sampling_params: a SamplingParams for all prompts, or a list with one for each.
        Returns a RequestOutput for each prompt, in order. stream=True: an iterator of RequestOutputs, each with
        everything so far of a request that got tokens in a step; a new call ends an iterator that is not exhausted.
        Raises ValueError or TypeError for a bad request, on every rank, before any work starts.
        """
        self._check_open()
        self._call.close()
        self._call = self._lead(prompts, sampling_params, stream) if self._ranks.rank == 0 else self._follow()
        next(self._call)  # accepted, or refused by an exception
        if stream:
            return streamed(self._call)
        *_, done = self._call
        assert isinstance(done, Done)
        return done.outputs

    def chat(
        self, messages: Any, sampling_params: Any = None, *, stream: bool = False, **template_options: Any
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Complete conversations: a list of {"role", "content"}, or a list of such lists; by the chat template."""
        self._check_open()
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{self.config.model} has no chat template; use generate with text of your own form")
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        options = {"add_generation_prompt": True, "tokenize": False} | template_options
        texts = [self.tokenizer.apply_chat_template(one, **options) for one in conversations]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.generate(ids, sampling_params, stream=stream)

    def _lead(self, prompts: Any, params: Any, stream: bool) -> Call:
        """Rank 0's side of a call: everything it yields, it also sends to the other ranks."""
        if self._workers is not None:
            self._workers.wake()
        try:
            accepted = accept(prompts, params, self.tokenizer, self._engine.limits)
        except (ValueError, TypeError) as error:
            self._tell(Done([], error))
            raise
        try:
            yield self._tell(Accepted())
            outputs = yield from self._run(accepted, stream)
        except GeneratorExit:  # the caller had enough
            self._tell(Done([]))
            raise
        except BaseException:
            self.close(force=True, why="an earlier call failed")
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
        try:
            for message in messages:
                if isinstance(message, Done):
                    break
                yield message
        except GeneratorExit:  # the caller had enough, on every rank
            while not isinstance(next(messages), Done):
                pass
            self._finish_trace()
            raise
        except BaseException:
            self.close(force=True, why="an earlier call failed")
            raise
        self._finish_trace()
        assert isinstance(message, Done)
        if message.error is not None:
            raise message.error
        yield message

    # -- the timeline ----------------------------------------------------------------------------------------------

    def overlap_summary(self) -> OverlapSummary | None:
        """How much communication was hidden, in all calls so far; None unless `trace` was set."""
        return summary(self.spans) if self.config.trace else None

    def _finish_trace(self) -> None:
        if self.config.trace is None:
            return
        self.spans = collect_spans(self._runner, self._ranks)
        if self._ranks.rank == 0:
            from tokenweave.trace import chrome, picture  # here, because matplotlib takes a second to import

            path = Path(self.config.trace)
            chrome.write(self.spans, path)
            picture.draw(self.spans, path.with_suffix(".png"), title=self._title())

    def _title(self) -> str:
        simulated = ", simulated link" if self.config.link else ""
        return f"{Path(self.config.model).name}, W={self._ranks.world_size}, overlap={self.config.overlap}{simulated}"

    # -- closing ---------------------------------------------------------------------------------------------------

    def close(self, force: bool = False, why: str = "it was closed") -> None:
        """Free the model, the cache, the process groups, and the ranks that this object started."""
        if self._closed is not None:
            return
        if not force:
            self._call.close()
        self._closed = why
        if force and self._workers is not None:
            self._workers.stop(force=True)
        self._rank.close()
        self._end_workers()
        torch.set_num_threads(self._threads)
        for name in ("_engine", "_runner", "_rank", "_call"):
            self.__dict__.pop(name, None)

    def _end_workers(self, force: bool = False) -> None:
        if self._workers is not None:
            self._workers.stop(force)
            self._workers = None
            leave_default_group()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise RuntimeError(f"this LLM cannot be used any more: {self._closed}; make a new one")

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def streamed(call: Call) -> Iterator[RequestOutput]:
    """The outputs of a call as they come. Ending this iterator ends the call."""
    with contextlib.closing(call):
        for message in call:
            if isinstance(message, Emit):
                yield from message.outputs


def no_call() -> Call:
    """A call that is over."""
    yield from ()
