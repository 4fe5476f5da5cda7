"""From what a user passes as prompts to checked Prompts; a bad one is refused before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenweave.engine.request import Prompt
from tokenweave.sampling_params import SamplingParams


@dataclass(frozen=True)
class Limits:
    """What a request must stay within. capacity_tokens: what the whole KV cache holds."""

    vocab_size: int
    max_model_len: int
    capacity_tokens: int


def accept(prompts: Any, params: Any, tokenizer: Any, limits: Limits) -> list[Prompt]:
    """Check a call's prompts and sampling parameters. Raises ValueError or TypeError naming the first bad one."""
    listed = as_list(prompts)
    per_prompt = as_params(params, len(listed))
    return [
        accept_one(f"prompt {i}", prompt, one, tokenizer, limits)
        for i, (prompt, one) in enumerate(zip(listed, per_prompt, strict=True))
    ]


def as_list(prompts: Any) -> list[Any]:
    """str or list[int]: one prompt; list of them: several."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise TypeError(f"prompts must be str, list[str], list[int] or list[list[int]], got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts is empty; pass at least one prompt")
    return [prompts] if all(is_integer(one) for one in prompts) else list(prompts)


def as_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """list[dict]: one conversation; list of them: several. Not every chat template refuses what is neither."""
    conversations = [messages] if are_all(messages, dict) and messages else messages
    if not are_all(conversations, list | tuple) or not all(are_all(one, dict) for one in conversations):
        raise TypeError(
            f'messages must be a list of {{"role", "content"}}, or a list of such lists, got {messages!r:.100}'
        )
    return list(conversations)


def are_all(values: Any, kind: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)


def as_params(params: Any, count: int) -> list[SamplingParams]:
    """One SamplingParams for all prompts, or one for each."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
        raise TypeError(f"sampling_params must be a SamplingParams, or a list or tuple of them, got {params!r:.100}")
    if len(params) != count:
        raise ValueError(
            f"there are {count} prompts but {len(params)} sampling_params; pass one for all, or one for each"
        )
    return list(params)


def accept_one(name: str, prompt: Any, params: SamplingParams, tokenizer: Any, limits: Limits) -> Prompt:
    ids = tokenize(name, prompt, tokenizer)
    if params.stop and tokenizer is None:
        raise ValueError(f"stop={params.stop!r} needs text, but the model folder has no tokenizer; use stop_token_ids")
    room = limits.max_model_len - len(ids)
    if not ids:
        raise ValueError(f"{name} is empty; expected at least one token; give it some text")
    for token_id in ids:
        if not 0 <= token_id < limits.vocab_size:
            raise ValueError(f"{name} has token id {token_id}; expected 0 <= id < {limits.vocab_size}, the vocabulary")
    for token_id in params.stop_token_ids or ():
        if not 0 <= token_id < limits.vocab_size:
            raise ValueError(f"stop_token_ids has {token_id}; expected 0 <= id < {limits.vocab_size}, the vocabulary")
    if room < 1:
        raise ValueError(
            f"{name} has {len(ids)} tokens, which leaves no room for output in max_model_len={limits.max_model_len}; "
            "shorten it or raise max_model_len"
        )
    fitting = limits.capacity_tokens - len(ids) + 1  # the last token's keys and values are never needed
    max_tokens = max(1, min(room, fitting)) if params.max_tokens is None else min(params.max_tokens, room)
    longest = len(ids) + max_tokens - 1
    if longest > limits.capacity_tokens:
        raise ValueError(
            f"{name} needs KV blocks for {longest} tokens ({len(ids)} of prompt, up to {max_tokens} of output), but "
            f"the cache holds {limits.capacity_tokens}; raise num_kv_blocks or lower max_tokens"
        )
    return Prompt(prompt if isinstance(prompt, str) else None, tuple(ids), params, max_tokens)


def tokenize(name: str, prompt: Any, tokenizer: Any) -> Sequence[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"{name} is text, but the model folder has no tokenizer; add one, or pass token ids (in Python); "
                "`tokenweave bench` makes prompts of its own"
            )
        if not prompt:
            raise ValueError(f"{name} is empty; expected at least one character; give it some text")
        return tokenizer.encode(prompt)
    if not isinstance(prompt, list | tuple):
        raise TypeError(f"{name} must be a str or a list of token ids, got {type(prompt).__name__}")
    for one in prompt:
        if not is_integer(one):
            raise TypeError(
                f"{name} has a {type(one).__name__} among its token ids; expected an int; convert it with int()"
            )
    return prompt


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
