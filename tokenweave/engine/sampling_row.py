"""What the sampler must know of one row of logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenweave.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Rank 0 builds a row for each token to be drawn and broadcasts it with the step's batch.

    temperature: 0 is greedy; key, position and the filters are then unused.
    top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    key: the completion's 64-bit key (random.request_key). position: index in the sequence of the token to be drawn.
    prompt_token_ids, output_token_ids: only where a penalty needs them.
    late: where, among the tokens of the step before, the last output token is, if the host does not know it yet; like
        output_token_ids, which it then follows, only where a penalty needs it.
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
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    late: int | None = None
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


def sampling_row(
    params: SamplingParams,
    key: int,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
    eos_token_ids: Sequence[int] = (),
    late: int | None = None,
) -> SamplingRow:
    """The row for the next token of a sequence of which output_token_ids are out, and one more if one is late."""
    row: dict = {}
    out = len(output_token_ids) + (late is not None)
    if params.logprobs is not None:
        row |= {"logprobs": params.logprobs}
    if out < params.min_tokens:
        row |= {"suppressed_token_ids": tuple(sorted({*eos_token_ids, *(params.stop_token_ids or ())}))}
    row |= _penalty_fields(params, prompt_token_ids, output_token_ids, late)
    if not params.greedy:
        row |= {"temperature": params.temperature, "top_k": max(params.top_k, 0), "top_p": params.top_p}
        row |= {"min_p": params.min_p, "key": key, "position": len(prompt_token_ids) + out}
    return SamplingRow(**row) if row else GREEDY


def _penalty_fields(
    params: SamplingParams, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], late: int | None
) -> dict:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    values = {name: getattr(params, name) for name in names}
    if values == {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}:
        return {}
    prompt = tuple(prompt_token_ids) if params.repetition_penalty != 1 else ()
    return values | {"prompt_token_ids": prompt, "output_token_ids": tuple(output_token_ids), "late": late}
