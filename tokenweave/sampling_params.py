"""What one request asks of sampling; names and meanings as in vLLM."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenweave.keywords import known_keywords

# Below this, logits that differ at all differ by more than the noise once scaled: the draw is the argmax.
GREEDY_TEMPERATURE = 1e-5

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@known_keywords
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample the output of one request.

    n: completions per prompt; more than one needs temperature > 0.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_p, top_k, min_p: keep the smallest set of tokens with probability top_p (1 = off); the top_k most likely
        (0 or -1 = off); those with at least min_p times the probability of the likeliest (0 = off).
    seed: the same seed and prompt give the same tokens whatever else runs; None draws from the engine's seed.
    max_tokens: most tokens to generate; None = up to max_model_len.
    min_tokens: EOS, stop_token_ids and stop strings do not end the output before this many tokens.
    stop: a string or strings that end the output; kept as a tuple. Cut from the text unless include_stop_str_in_output.
    stop_token_ids: token ids that end the output; kept as a tuple.
    ignore_eos: go on after EOS.
    logprobs: report the log-probabilities of this many likeliest tokens, and the sampled one; None = no report.
    repetition_penalty: > 1 makes tokens of prompt and output less likely (1 = off).
    presence_penalty, frequency_penalty: subtracted once, or once per occurrence, from logits of tokens in the output.
    skip_special_tokens: leave special tokens out of the text.

    Errors: ValueError for a value of the wrong type or out of range, TypeError for an unknown keyword; one line each.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        self._check_types()
        self._check_distribution()
        self._check_penalties()
        self._check_lengths()
        self._check_stops()

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def penalised(self) -> bool:
        """Tokens that there are already change the next one's logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _check_types(self) -> None:
        for name in ("n", "top_k", "min_tokens"):
            _check_int(name, getattr(self, name))
        for name in ("seed", "max_tokens", "logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name))
        for name in ("temperature", "top_p", "min_p", *PENALTIES):
            _check_number(name, getattr(self, name))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _require(
                isinstance(getattr(self, name), bool), name, repr(getattr(self, name)), "a bool", "pass True or False"
            )

    def _check_distribution(self) -> None:
        _require(self.temperature >= 0, "temperature", self.temperature, "a number >= 0", "pass 0 for greedy decoding")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]", "pass 1 to keep every token")
        _require(self.top_k >= -1, "top_k", self.top_k, "an int >= 1, or 0 or -1 for off", "pass 0 to keep every token")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1]", "pass 0 to keep every token")
        if self.seed is not None:
            _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit signed int", "pass a smaller one")
        if self.logprobs is not None:
            _require(self.logprobs >= 0, "logprobs", self.logprobs, "an int >= 0 or None", "pass None for no report")

    def _check_penalties(self) -> None:
        advice = "pass 1 for no penalty"
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a number > 0", advice)
        for name in PENALTIES[1:]:
            value = getattr(self, name)
            _require(-2 <= value <= 2, name, value, "a number in [-2, 2]", "pass 0 for no penalty")

    def _check_lengths(self) -> None:
        _require(self.n >= 1, "n", self.n, "an int >= 1", "pass 1 for one completion")
        advice = "ask for one completion, or pass a temperature > 0"
        _require(self.n == 1 or not self.greedy, "n", self.n, "1 when temperature is 0 (all would be equal)", advice)
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "an int >= 0", "pass 0 for no minimum")
        if self.max_tokens is not None:
            advice = "pass None to generate up to max_model_len"
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "an int >= 1 or None", advice)
            expected = f"at most max_tokens={self.max_tokens}"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, expected, "lower it")

    def _check_stops(self) -> None:
        for text in self.stop or ():
            expected = "a string or strings"
            _require(isinstance(text, str), "stop", repr(self.stop), expected, "pass token ids as stop_token_ids")
            _require(text != "", "stop", repr(self.stop), "non-empty strings", "leave the empty one out, or pass None")
        for token_id in self.stop_token_ids or ():
            _check_int("a member of stop_token_ids", token_id)
            _require(token_id >= 0, "a member of stop_token_ids", token_id, "an int >= 0", "pass ids of the vocabulary")


def _as_tuple(name: str, value: Any) -> tuple:
    if value is None:
        return ()
    _require(isinstance(value, (list, tuple)), name, repr(value), "a list or tuple", "put it into a list")
    return tuple(value)


def _check_int(name: str, value: Any) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int, name, repr(value), "an int", "convert it with int()")


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(is_number, name, repr(value), "a number", "convert it with float()")
    _require(math.isfinite(value), name, value, "a finite number", "pass an ordinary number")


def _require(condition: bool, name: str, value: Any, expected: str, advice: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; expected {expected}; {advice}")
