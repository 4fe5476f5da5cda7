"""Sampled text on real ranks: with a seed it depends on nothing but the request. And what ends a text, and its odds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import prompt_batch
from tests.reference import BOUND, teacher_forced
from tokenweave import LLM, RequestOutput, SamplingParams
from tokenweave.engine.policy import Policy

NEW_TOKENS = 14
# The last two begin alike, for the prefix cache.
PROMPTS = [*prompt_batch(5, (3, 37, 1, 20)), *(prompt_batch(6, (33,))[0] + [tail] for tail in (1, 2))]
PARAMS = [
    SamplingParams(temperature=1.0, seed=11, max_tokens=NEW_TOKENS, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, seed=11, max_tokens=NEW_TOKENS, ignore_eos=True, n=3),
    SamplingParams(temperature=1.3, top_k=40, seed=-5, max_tokens=NEW_TOKENS - 5, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(temperature=1.1, min_p=0.02, seed=2**62, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2),
    SamplingParams(
        temperature=0.9,
        seed=11,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        min_tokens=4,
    ),
]
Call = tuple[Sequence[Any], Sequence[SamplingParams] | SamplingParams]


@dataclass(frozen=True)
class Made:
    """What one call gave."""

    outputs: list[RequestOutput]

    @property
    def tokens(self) -> list[list[list[int]]]:
        """By request and completion."""
        return [[one.token_ids for one in output.outputs] for output in self.outputs]

    @property
    def preemptions(self) -> int:
        return sum(output.metrics.preemptions for output in self.outputs)

    @property
    def cached_tokens(self) -> int:
        return sum(output.metrics.cached_tokens for output in self.outputs)


def make(folder: Path, calls: Sequence[Call], options: Mapping[str, Any]) -> list[Made]:
    """Runs on every rank: the calls, one after the other, on one LLM whose cache starts as NaN."""
    with LLM(folder, progress=False, **options) as llm:
        llm._runner.storage.fill_(float("nan"))
        return [Made(llm.generate(list(prompts), params)) for prompts, params in calls]


def made(ranks, world_size: int, folder: Path, *calls: Call, **options: Any) -> list[Made]:
    """The same, from the test: rank 0's results, which all ranks must share."""
    results = ranks(world_size).run(make, folder, calls, {"num_kv_blocks": 64, "block_size": 8} | options)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert one.outputs == other.outputs
    return results[0]


TOGETHER: Call = (PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def alone(ranks, checkpoint) -> list[list[list[int]]]:
    """Each request by itself, on one rank, in one piece, nothing cached: what all others must be equal to."""
    calls = [([prompt], [params]) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    each = made(ranks, 1, checkpoint("llama"), *calls, overlap="off", enable_prefix_caching=False)
    tokens = [one.tokens[0] for one in each]
    assert [[len(one) for one in request] for request in tokens] == [
        [params.max_tokens] * params.n for params in PARAMS
    ]
    return tokens


@pytest.mark.parametrize("overlap", ["off", "fused", "weave", "auto"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_among_others(world_size, overlap, ranks, checkpoint, alone):
    (result,) = made(ranks, world_size, checkpoint("llama"), TOGETHER, overlap=overlap)
    assert result.tokens == alone


@pytest.mark.parametrize("world_size", [1, 2])
def test_in_another_order_and_after_others(world_size, ranks, checkpoint, alone):
    backwards = (PROMPTS[::-1], PARAMS[::-1])
    few = (PROMPTS[1:4], PARAMS[1:4])
    results = made(ranks, world_size, checkpoint("llama"), backwards, few, overlap="weave")
    assert [result.tokens for result in results] == [alone[::-1], alone[1:4]]


@pytest.mark.parametrize("overlap", ["off", "weave"])
def test_in_chunks_and_few_at_a_time(overlap, ranks, checkpoint, alone):
    options = {"max_num_batched_tokens": 7, "max_num_seqs": 3, "overlap": overlap}
    (result,) = made(ranks, 2, checkpoint("llama"), TOGETHER, **options)
    assert result.tokens == alone


@pytest.mark.parametrize("overlap", ["off", "weave"])
def test_with_a_prefix_that_is_cached(overlap, ranks, checkpoint, alone):
    first, again = made(ranks, 2, checkpoint("llama"), TOGETHER, TOGETHER, overlap=overlap)
    assert first.tokens == again.tokens == alone
    assert first.cached_tokens == 32  # of a prompt that begins as an earlier one of the same call does
    assert again.cached_tokens == sum((len(prompt) - 1) // 8 * 8 for prompt in PROMPTS)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_after_preemption(world_size, caching, ranks, checkpoint, alone):
    """The pool holds the longest request and little more."""
    options = {"num_kv_blocks": 15, "block_size": 4, "max_num_batched_tokens": 40, "enable_prefix_caching": caching}
    (result,) = made(ranks, world_size, checkpoint("llama"), TOGETHER, overlap="weave", **options)
    assert result.preemptions > 0
    assert result.tokens == alone


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": "weave"},
        {"overlap": "off", "max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"overlap": "weave", "num_kv_blocks": 15, "block_size": 4, "max_num_batched_tokens": 40},
    ],
    ids=["at ease", "in chunks", "preempted"],
)
def test_with_steps_launched_ahead(options, ranks, checkpoint, alone):
    """Every rank runs a step before rank 0 has read the tokens of the one before it."""
    first, again = made(ranks, 2, checkpoint("llama"), TOGETHER, TOGETHER, async_scheduling=True, **options)
    assert first.tokens == again.tokens == alone
    assert (first.preemptions > 0) == ("num_kv_blocks" in options)


PENALTIES = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "n": 2},
    {"frequency_penalty": 0.7, "min_tokens": 3},
    {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.3, "max_tokens": 4},
]


def test_penalties_where_texts_come_and_go(ranks, checkpoint):
    """Ranks keep the tokens that penalties count: of texts that pause, and of others in the place of ended ones."""
    prompts = prompt_batch(13, (5, 30, 2, 17, 9, 3, 21, 12))
    shared = {"temperature": 0.8, "seed": 3, "max_tokens": 12}
    params = [SamplingParams(**(shared | one)) for one in PENALTIES * 2]
    calls = [([prompt], [one]) for prompt, one in zip(prompts, params, strict=True)]
    each = made(ranks, 1, checkpoint("llama"), *calls, overlap="off", enable_prefix_caching=False)
    options = {"num_kv_blocks": 12, "block_size": 4, "max_num_seqs": 4, "async_scheduling": True}
    first, again = made(ranks, 2, checkpoint("llama"), (prompts, params), (prompts, params), **options)
    assert first.preemptions > 0
    assert first.tokens == again.tokens == [one.tokens[0] for one in each]


def shortest(sequences: Sequence[Any]) -> Any:
    return min(sequences, key=lambda sequence: len(sequence.tokens))


def small_chunks(sequence: Any, budget: int) -> int:
    return min(sequence.left, budget, 5)


def test_under_another_policy(ranks, checkpoint, alone):
    """Started and thrown out in another order, and in other pieces."""
    policy = Policy(order=shortest, budget=small_chunks, preempt=shortest)
    options = {"num_kv_blocks": 15, "block_size": 4, "max_num_batched_tokens": 40, "overlap": "weave"}
    (result,) = made(ranks, 2, checkpoint("llama"), TOGETHER, policy=policy, **options)
    assert result.preemptions > 0
    assert result.tokens == alone


@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_of_other_models(name, ranks, checkpoint):
    one, two = (made(ranks, world_size, checkpoint(name), TOGETHER, overlap="weave")[0].tokens for world_size in (1, 2))
    assert one == two


def test_dynamic_rope_shares_only_what_is_rotated_alike(ranks, checkpoint):
    """Trained on 256 tokens: a longer prompt is rotated by its length, so its keys are of no use to one of another."""
    text = prompt_batch(8, (300,))[0]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    calls = [([text[:length]], params) for length in (240, 250, 300, 290, 300)]
    options = {"num_kv_blocks": 200, "overlap": "weave"}
    results = made(ranks, 2, checkpoint("llama_dynamic"), *calls, **options)
    assert [result.cached_tokens for result in results] == [0, 240, 0, 0, 296]
    alone = made(ranks, 2, checkpoint("llama_dynamic"), *calls, enable_prefix_caching=False, **options)
    assert [result.tokens for result in results] == [result.tokens for result in alone]


# -- seeds and completions ---------------------------------------------------------------------------------------------


def test_completions_of_one_request(alone):
    """Different texts, all from one seed."""
    assert len(set(map(tuple, alone[1]))) == 3


def test_more_completions_do_not_change_the_first(ranks, checkpoint, alone):
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=11, max_tokens=NEW_TOKENS, ignore_eos=True)
    (result,) = made(ranks, 1, checkpoint("llama"), ([PROMPTS[1]], params))
    assert result.tokens[0][0] == alone[1][0]


def test_the_seed_decides(ranks, checkpoint):
    params = [SamplingParams(seed=seed, max_tokens=NEW_TOKENS, ignore_eos=True) for seed in (1, 2, 1)]
    (result,) = made(ranks, 1, checkpoint("llama"), ([PROMPTS[1]] * 3, params))
    first, other, again = result.tokens
    assert first == again != other


def test_without_a_seed_the_engines_decides(ranks, checkpoint):
    call = ([PROMPTS[1]] * 2, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    options = {1: {"seed": 4, "overlap": "off"}, 2: {"seed": 4, "overlap": "weave"}}
    first, again = made(ranks, 1, checkpoint("llama"), call, call, **options[1])
    assert len({tuple(one) for result in (first, again) for (one,) in result.tokens}) == 4  # no request repeats another
    same = made(ranks, 2, checkpoint("llama"), call, call, **options[2])
    assert [one.tokens for one in same] == [first.tokens, again.tokens]
    (other,) = made(ranks, 1, checkpoint("llama"), call, seed=5)
    assert other.tokens != first.tokens


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_logprobs_are_the_references(ranks, checkpoint):
    """Of the raw logits, whatever the sampling makes of them."""
    folder, count = checkpoint("qwen3"), 4
    params = [
        SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=count),
        SamplingParams(temperature=1.5, top_k=5, seed=3, max_tokens=10, ignore_eos=True, logprobs=count, n=2),
        SamplingParams(temperature=1.0, seed=3, max_tokens=10, ignore_eos=True, logprobs=0),
    ]
    prompts = [PROMPTS[1], PROMPTS[3], PROMPTS[0]]
    (result,) = made(ranks, 2, folder, (prompts, params), overlap="weave")
    for prompt, asked, output in zip(prompts, params, result.outputs, strict=True):
        for one in output.outputs:
            logits = teacher_forced(folder, [*prompt, *one.token_ids])[len(prompt) - 1 : -1]
            check_logprobs(one, asked.logprobs, logits)


def check_logprobs(one, count: int, logits: torch.Tensor) -> None:
    expected = logits.log_softmax(-1)
    tolerance = 2 * BOUND * float(logits.abs().max())
    assert len(one.logprobs) == len(one.token_ids)
    for token_id, listed, row in zip(one.token_ids, one.logprobs, expected, strict=True):
        likeliest = row.topk(max(count, 1)).values
        assert next(iter(listed)) == token_id
        assert len(listed) in (count, count + 1)
        for listed_id, entry in listed.items():
            assert entry.logprob == pytest.approx(float(row[listed_id]), abs=tolerance)
            assert entry.rank == pytest.approx(int((row > row[listed_id] + tolerance).sum()) + 1, abs=1)
            if count and listed_id != token_id:
                assert entry.logprob >= likeliest[-1] - tolerance
    sampled = [row[token_id] for token_id, row in zip(one.token_ids, expected, strict=True)]
    assert one.cumulative_logprob == pytest.approx(float(sum(sampled)), abs=10 * tolerance)


# -- what ends a text --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Greedy:
    """A folder, a prompt in it, and what follows greedily."""

    folder: Path
    prompt: list[int]
    tokens: list[int]

    def first(self, allowed) -> int:
        """The first place at 3 or later of a token that is new there and allowed."""
        return next(i for i in range(3, 20) if self.tokens[i] not in self.tokens[:i] and allowed(i))

    def ascii_from(self, i: int) -> bool:
        return all(32 < token < 127 for token in self.tokens[i : i + 2])


@pytest.fixture(scope="module")
def greedy(ranks, checkpoint) -> Greedy:
    folder, prompts = checkpoint("llama"), prompt_batch(7, (9,) * 12)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    (result,) = made(ranks, 1, folder, (prompts, params))
    for prompt, (tokens,) in zip(prompts, result.tokens, strict=True):
        text = Greedy(folder, prompt, tokens)
        if any(text.ascii_from(i) and tokens[i] not in tokens[:i] for i in range(3, 18)):
            return text
    raise AssertionError("none of these texts has two printable characters in a row; take other prompts")


def ends(ranks, greedy: Greedy, folder: Path | None = None, **params: Any):
    asked = SamplingParams(**{"temperature": 0.0, "max_tokens": 24} | params)
    (result,) = made(ranks, 2, folder or greedy.folder, ([greedy.prompt], asked), overlap="weave")
    return result.outputs[0].outputs[0]


def test_a_stop_token(ranks, greedy):
    place = greedy.first(lambda i: True)
    one = ends(ranks, greedy, stop_token_ids=[greedy.tokens[place], 255])
    assert one.token_ids == greedy.tokens[: place + 1]
    assert (one.finish_reason, one.stop_reason) == ("stop", greedy.tokens[place])


def test_a_stop_string(ranks, greedy):
    place = greedy.first(greedy.ascii_from)
    stop = bytes(greedy.tokens[place : place + 2]).decode()
    one = ends(ranks, greedy, stop=["\x00\x00\x00", stop])
    assert one.token_ids == greedy.tokens[: place + 2]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    assert one.text == bytes(greedy.tokens[:place]).decode(errors="replace")
    kept = ends(ranks, greedy, stop=stop, include_stop_str_in_output=True)
    assert kept.text == one.text + stop


def test_a_stop_string_before_min_tokens_is_text(ranks, greedy):
    place = greedy.first(greedy.ascii_from)
    stop = bytes(greedy.tokens[place : place + 2]).decode()
    one = ends(ranks, greedy, stop=stop, min_tokens=24)
    assert one.token_ids == greedy.tokens
    assert one.finish_reason == "length"


@pytest.fixture(scope="module")
def with_eos(greedy, tmp_path_factory) -> tuple[Path, int]:
    """The same model, with an end token that its greedy text comes to."""
    place = greedy.first(lambda i: True)
    folder = tmp_path_factory.mktemp("eos") / "model"
    shutil.copytree(greedy.folder, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [258, greedy.tokens[place]]}))
    return folder, place


def test_eos(ranks, greedy, with_eos):
    folder, place = with_eos
    one = ends(ranks, greedy, folder)
    assert one.token_ids == greedy.tokens[: place + 1]
    assert (one.finish_reason, one.stop_reason) == ("stop", None)


def test_eos_ignored(ranks, greedy, with_eos):
    one = ends(ranks, greedy, with_eos[0], ignore_eos=True)
    assert one.token_ids == greedy.tokens
    assert one.finish_reason == "length"


def test_no_eos_before_min_tokens(ranks, greedy, with_eos):
    """There the second best is taken instead."""
    folder, place = with_eos
    eos, least = greedy.tokens[place], place + 4
    one = ends(ranks, greedy, folder, min_tokens=least)
    assert len(one.token_ids) >= least
    logits = teacher_forced(folder, [*greedy.prompt, *one.token_ids])[len(greedy.prompt) - 1 : -1].clone()
    logits[:least, [eos, 258]] = float("-inf")
    assert one.token_ids == logits.argmax(-1).tolist()
    assert eos not in one.token_ids[:least]
