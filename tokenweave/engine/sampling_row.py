"""What the sampler must know of one row of logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenweave.sampling_params import PENALTIES, SamplingParams


@dataclass(frozen=True, slots=True)
class History:
    """The tokens that a row's penalties count. Every rank keeps what it was told, so a step says only what is new.

    slot: where ranks keep them. start: how many they have there by now. token_ids: those that follow.
    late: where, among the tokens of the step before, one more is that the host does not know yet. It is told again when
        it is known.
    prompt_len: how many of them, the first, are the prompt's.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    late: int | None = None
    prompt_len: int = 0

    @property
    def known(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def length(self) -> int:
        return self.known + (self.late is not None)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Rank 0 builds a row for each token to be drawn and broadcasts it with the step's batch.

    temperature: 0 is greedy; key, position and the filters are then unused.
    top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    key: the completion's 64-bit key (random.request_key). position: index in the sequence of the token to be drawn.
    history: only where a penalty needs it; None is empty.
    suppressed_token_ids: never drawn (EOS and stop tokens before min_tokens).
    logprobs: how many of the likeliest tokens to report; None is no report.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: int = 0
    position: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    history: History | None = None
    suppressed_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    @property
    def random(self) -> bool:
        return self.temperature > 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def plain(self) -> bool:
        """The token is the argmax of the raw logits."""
        return not (self.random or self.penalised or self.suppressed_token_ids)


# One shared object: in a pickle of many rows it is written once.
GREEDY = SamplingRow()
NO_HISTORY = History(slot=0, start=0, token_ids=())


def sampling_row(
    params: SamplingParams,
    key: int,
    prompt_len: int,
    out: int,
    eos_token_ids: Sequence[int] = (),
    history: History | None = None,
) -> SamplingRow:
    """The row for the next token of a sequence of which `out` tokens are out, late ones included."""
    row: dict = {}
    if params.logprobs is not None:
        row |= {"logprobs": params.logprobs}
    if out < params.min_tokens:
        row |= {"suppressed_token_ids": tuple(sorted({*eos_token_ids, *(params.stop_token_ids or ())}))}
    if params.penalised:
        row |= {name: getattr(params, name) for name in PENALTIES} | {"history": history}
    if not params.greedy:
        row |= {"temperature": params.temperature, "top_k": max(params.top_k, 0), "top_p": params.top_p}
        row |= {"min_p": params.min_p, "key": key, "position": prompt_len + out}
    return SamplingRow(**row) if row else GREEDY
