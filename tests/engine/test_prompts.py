"""What a caller may pass as prompts, and what is said about what they may not."""

from __future__ import annotations

import copy

import pytest

from tests.checkpoints import byte_tokenizer
from tokenweave.engine.prompts import Limits, accept
from tokenweave.sampling_params import SamplingParams

LIMITS = Limits(vocab_size=259, max_model_len=20, capacity_tokens=100)
PARAMS = SamplingParams(max_tokens=4)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def ids(prompts, tokenizer, params=None) -> list[tuple[int, ...]]:
    return [prompt.token_ids for prompt in accept(prompts, params, tokenizer, LIMITS)]


# -- good forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [(97, 98)]),
        (["ab"], [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 98], [(97, 98)]),
        ((97, 98), [(97, 98)]),
        ([[97, 98], [99]], [(97, 98), (99,)]),
        (([97], (98,)), [(97,), (98,)]),
        (["ab", [0, 258]], [(97, 98), (0, 258)]),
    ],
)
def test_forms(prompts, expected, tokenizer):
    assert ids(prompts, tokenizer) == expected


def test_text_is_kept_and_token_ids_have_none(tokenizer):
    assert [prompt.text for prompt in accept(["ab", [97]], None, tokenizer, LIMITS)] == ["ab", None]


def test_token_ids_need_no_tokenizer():
    assert ids([[97, 98]], None) == [(97, 98)]


def test_the_longest_prompt_leaves_room_for_one_token(tokenizer):
    (prompt,) = accept([1] * 19, SamplingParams(max_tokens=50), tokenizer, LIMITS)
    assert prompt.max_tokens == 1


@pytest.mark.parametrize(("max_tokens", "expected"), [(3, 3), (15, 15), (16, 15), (None, 15)])
def test_max_tokens_ends_at_the_models_length(max_tokens, expected, tokenizer):
    (prompt,) = accept([1] * 5, SamplingParams(max_tokens=max_tokens), tokenizer, LIMITS)
    assert prompt.max_tokens == expected


def test_the_last_token_needs_no_place_in_the_cache():
    limits = Limits(vocab_size=10, max_model_len=1000, capacity_tokens=8)
    (prompt,) = accept([1] * 5, SamplingParams(max_tokens=4), None, limits)
    assert prompt.max_tokens == 4


def test_one_set_of_parameters_for_all_or_one_for_each(tokenizer):
    assert [prompt.params for prompt in accept(["a", "b"], None, tokenizer, LIMITS)] == [SamplingParams()] * 2
    assert [prompt.params for prompt in accept(["a", "b"], PARAMS, tokenizer, LIMITS)] == [PARAMS] * 2
    each = (PARAMS, SamplingParams(seed=1))
    assert [prompt.params for prompt in accept(["a", "b"], each, tokenizer, LIMITS)] == list(each)


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD_PROMPTS = [
    ("", ValueError, "prompt 0 is empty; expected at least one character; give it some text"),
    ([""], ValueError, "prompt 0 is empty"),
    ([[]], ValueError, "prompt 0 is empty; expected at least one token; give it some text"),
    (["a", ""], ValueError, "prompt 1 is empty"),
    ([], ValueError, "prompts is empty; pass at least one prompt"),
    ((), ValueError, "prompts is empty"),
    (None, TypeError, "prompts must be str, list[str], list[int] or list[list[int]], got NoneType"),
    (b"ab", TypeError, "prompts must be str, list[str], list[int] or list[list[int]], got bytes"),
    ({"a": 1}, TypeError, "got dict"),
    (7, TypeError, "got int"),
    (iter("ab"), TypeError, "got str_"),
    ([1, "a"], TypeError, "prompt 0 must be a str or a list of token ids, got int"),
    ([None], TypeError, "prompt 0 must be a str or a list of token ids, got NoneType"),
    (["a", {}], TypeError, "prompt 1 must be a str or a list of token ids, got dict"),
    ([1.0, 2.0], TypeError, "prompt 0 must be a str or a list of token ids, got float"),
    ([True, False], TypeError, "prompt 0 must be a str or a list of token ids, got bool"),
    ([[1, 2.0]], TypeError, "prompt 0 has a float among its token ids; expected an int; convert it with int()"),
    ([[1], [2, True]], TypeError, "prompt 1 has a bool among its token ids"),
    ([[[1]]], TypeError, "prompt 0 has a list among its token ids"),
    ([1, 259], ValueError, "prompt 0 has token id 259; expected 0 <= id < 259, the vocabulary"),
    ([[1], [-1]], ValueError, "prompt 1 has token id -1; expected 0 <= id < 259, the vocabulary"),
    (
        [1] * 20,
        ValueError,
        "prompt 0 has 20 tokens, which leaves no room for output in max_model_len=20; shorten it or",
    ),
    (["a", "a" * 21], ValueError, "prompt 1 has 21 tokens, which leaves no room for output in max_model_len=20"),
]


@pytest.mark.parametrize(("prompts", "kind", "message"), BAD_PROMPTS)
def test_bad_prompts_are_refused_in_one_line(prompts, kind, message, tokenizer):
    with pytest.raises(kind) as caught:
        accept(prompts, PARAMS, tokenizer, LIMITS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_PARAMS = [
    ({"temperature": 0}, TypeError, "sampling_params must be a SamplingParams, or a list or tuple of them, got {'temp"),
    ([PARAMS, None], TypeError, "sampling_params must be a SamplingParams, or a list or tuple of them, got [Sampling"),
    (SamplingParams, TypeError, "sampling_params must be a SamplingParams"),
    ([PARAMS], ValueError, "there are 2 prompts but 1 sampling_params; pass one for all, or one for each"),
    ([PARAMS] * 3, ValueError, "there are 2 prompts but 3 sampling_params"),
    ([], ValueError, "there are 2 prompts but 0 sampling_params"),
    (
        SamplingParams(stop_token_ids=[259]),
        ValueError,
        "stop_token_ids has 259; expected 0 <= id < 259, the vocabulary",
    ),
]


@pytest.mark.parametrize(("params", "kind", "message"), BAD_PARAMS)
def test_bad_parameters_are_refused_in_one_line(params, kind, message, tokenizer):
    with pytest.raises(kind) as caught:
        accept(["a", "b"], params, tokenizer, LIMITS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_request_that_can_never_fit_the_cache(tokenizer):
    limits = Limits(vocab_size=259, max_model_len=1000, capacity_tokens=8)
    with pytest.raises(
        ValueError, match=r"^prompt 1 needs KV blocks for 9 tokens \(6 of prompt, up to 4 of output\), but the "
    ):
        accept(["a", "abcdef"], PARAMS, tokenizer, limits)


def test_text_without_a_tokenizer():
    message = r"^prompt 0 is text, but the model folder has no tokenizer; add one, or pass token ids \(in Python\); .*$"
    with pytest.raises(ValueError, match=message):
        accept("ab", PARAMS, None, LIMITS)


def test_stop_strings_without_a_tokenizer():
    """They could never be found, and must not be ignored."""
    with pytest.raises(ValueError, match=r"needs text, but the model folder has no tokenizer; use stop_token_ids$"):
        accept([1, 2], SamplingParams(stop="x"), None, LIMITS)


def test_what_the_caller_passed_is_left_as_it_was(tokenizer):
    prompts, params = [[1, 2], [3], [999]], [PARAMS, SamplingParams(stop=["x"]), PARAMS]
    before = copy.deepcopy((prompts, params))
    with pytest.raises(ValueError, match="prompt 2"):
        accept(prompts, params, tokenizer, LIMITS)
    accepted = accept(prompts[:2], params[:2], tokenizer, LIMITS)
    assert (prompts, params) == before
    prompts[0].append(7)
    assert accepted[0].token_ids == (1, 2)
