"""A request on its way through the engine: one prompt, its completions, and what they have given so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tokenweave.engine.output_text import OutputText
from tokenweave.engine.random import request_key
from tokenweave.engine.sampler import History, RowLogprobs, SamplingRow, sampling_row
from tokenweave.engine.sequence import Sequence
from tokenweave.engine.vocabulary import Vocabulary
from tokenweave.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from tokenweave.sampling_params import SamplingParams


@dataclass(frozen=True)
class Prompt:
    """A request as it was checked and accepted, before any work. max_tokens is bounded by the model's length."""

    text: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int


class Completion:
    """One text being generated for a request."""

    def __init__(self, index: int, prompt: Prompt, sequence: Sequence, key: int, vocabulary: Vocabulary):
        self.index = index
        self.params = prompt.params
        self.max_tokens = prompt.max_tokens
        self.sequence = sequence
        self.vocabulary = vocabulary
        self.key = key
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.slot: int | None = None  # where ranks keep the tokens that penalties count
        self.told = 0  # how many of them they were told
        self._text = OutputText(vocabulary.tokenizer, prompt.token_ids, self.params)
        alike = self.params.greedy and not self.params.penalised and self.params.min_tokens == 0
        self.every_row = sampling_row(self.params, key, 0, 0) if alike else None  # of all tokens, where none differs

    def row(self) -> SamplingRow:
        """How the next token is to be drawn. For one step: the next row tells only what this one did not."""
        if self.every_row is not None:
            return self.every_row
        sequence, params, prompt_len = self.sequence, self.params, len(self.sequence.prompt)
        history = self._history() if params.penalised else None
        out = sequence.length - prompt_len
        return sampling_row(params, self.key, prompt_len, out, self.vocabulary.eos_token_ids, history)

    def _history(self) -> History:
        """Of the tokens that its penalties count: the prompt's are of use to the repetition penalty alone."""
        assert self.slot is not None  # the engine gives it one
        sequence, prompt_len = self.sequence, len(self.sequence.prompt)
        whole = self.params.repetition_penalty != 1
        first = 0 if whole else prompt_len
        new = tuple(sequence.tokens[first + self.told :])
        late = sequence.drawn_at if sequence.late else None
        history = History(self.slot, self.told, new, late, prompt_len if whole else 0)
        self.told = history.known
        return history

    def push(self, token_id: int, logprobs: RowLogprobs | None) -> None:
        """A token was drawn. Sets finish_reason when it is the last."""
        self.sequence.tokens.append(token_id)
        if logprobs is not None:
            self._push_logprobs(logprobs)
        count = len(self.sequence.tokens) - len(self.sequence.prompt)
        free_to_stop = count >= self.params.min_tokens
        matched = self._text.push(token_id, scan=free_to_stop)
        if matched is not None:
            self.finish_reason, self.stop_reason = "stop", matched
        elif free_to_stop and token_id in (self.params.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token_id
        elif free_to_stop and not self.params.ignore_eos and token_id in self.vocabulary.eos_token_ids:
            self.finish_reason = "stop"
        elif count >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self._text.finish()

    def _push_logprobs(self, row: RowLogprobs) -> None:
        tokens = [self._decode(token_id) for token_id in row.token_ids]
        entries = zip(row.token_ids, row.logprobs, row.ranks, tokens, strict=True)
        self.logprobs.append({token_id: Logprob(value, rank, text) for token_id, value, rank, text in entries})
        self.cumulative_logprob += row.logprobs[0]

    def _decode(self, token_id: int) -> str:
        return "" if self.vocabulary.tokenizer is None else self.vocabulary.tokenizer.decode([token_id])

    def output(self) -> CompletionOutput:
        asked = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self._text.read(),
            token_ids=self.sequence.output,
            cumulative_logprob=self.cumulative_logprob if asked else None,
            logprobs=list(self.logprobs) if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


@dataclass(eq=False)
class RequestState:
    """One prompt with its n completions, and when things happened to it (seconds, time.monotonic)."""

    request_id: str
    prompt: Prompt
    completions: list[Completion]
    arrival_s: float = field(default_factory=time.monotonic)
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """Everything so far."""
        metrics = RequestMetrics(
            self.arrival_s,
            self.first_scheduled_s,
            self.first_token_s,
            self.finished_s,
            self.cached_tokens,
            sum(completion.sequence.preemptions for completion in self.completions),
        )
        outputs = [completion.output() for completion in self.completions]
        ids = list(self.prompt.token_ids)
        return RequestOutput(self.request_id, self.prompt.text, ids, outputs, self.finished, metrics)


def start_request(number: int, prompt: Prompt, salt: int, engine_seed: int, vocabulary: Vocabulary) -> RequestState:
    """A request as the engine takes it up. `number` counts the engine's requests, in order of arrival.

    Requests with a seed of their own draw the same tokens whatever their number; they are number 0 of that seed.
    """
    params = prompt.params
    seed, index = (engine_seed, number + 1) if params.seed is None else (params.seed, 0)
    sequences = [Sequence(prompt.token_ids, number, salt, prompt.max_tokens) for _ in range(params.n)]
    completions = [
        Completion(i, prompt, sequence, request_key(seed, index, i), vocabulary) for i, sequence in enumerate(sequences)
    ]
    return RequestState(str(number), prompt, completions)
