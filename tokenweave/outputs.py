"""What a request gives back."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability under the raw logits; rank 1 is the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One completion. Of a streamed request: everything so far.

    logprobs: per token, {token id: Logprob} of the likeliest and the sampled token; None unless asked for.
    cumulative_logprob: sum over the sampled tokens; None unless logprobs were asked for.
    finish_reason: "stop" (EOS, stop token or stop string), "length", or None while running.
    stop_reason: the stop token id or stop string that ended it; None for EOS and length.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Times on the clock of rank 0 (seconds, time.monotonic); None for what has not happened yet."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def latency_s(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished_s is None else self.finished_s - self.arrival_s


@dataclass(frozen=True)
class RequestOutput:
    """One prompt and its completions. prompt is None when token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
