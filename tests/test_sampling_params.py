import dataclasses
import math
import pickle

import pytest

from tokenweave.sampling_params import SamplingParams

INVALID = [
    ({"temperature": -0.1}, "temperature is -0.1; expected a number >= 0"),
    ({"temperature": math.nan}, "temperature is nan; expected a finite number"),
    ({"temperature": math.inf}, "temperature is inf; expected a finite number"),
    ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
    ({"temperature": None}, "temperature is None; expected a number"),
    ({"top_p": 0.0}, r"top_p is 0.0; expected a number in \(0, 1\]"),
    ({"top_p": 1.1}, r"top_p is 1.1; expected a number in \(0, 1\]"),
    ({"top_p": math.nan}, "top_p is nan"),
    ({"top_p": True}, "top_p is True; expected a number"),
    ({"top_k": -2}, "top_k is -2"),
    ({"top_k": 1.0}, "top_k is 1.0; expected an int"),
    ({"min_p": -0.1}, "min_p is -0.1"),
    ({"min_p": 1.5}, "min_p is 1.5"),
    ({"seed": 2**63}, "seed is 9223372036854775808; expected a 64-bit signed int"),
    ({"seed": 0.5}, "seed is 0.5; expected an int"),
    ({"max_tokens": -3}, "max_tokens is -3; expected an int >= 1 or None"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": True}, "max_tokens is True; expected an int"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": 17}, "min_tokens is 17; expected at most max_tokens=16"),
    ({"min_tokens": None}, "min_tokens is None; expected an int"),
    ({"n": 0}, "n is 0; expected an int >= 1"),
    ({"n": 2, "temperature": 0}, "n is 2; expected 1 when temperature is 0"),
    ({"stop": ""}, r"stop is \(''\,\); expected non-empty strings"),
    ({"stop": ["a", ""]}, r"stop is \('a', ''\); expected non-empty strings"),
    ({"stop": [3]}, r"stop is \(3,\); expected a string or strings; pass token ids as stop_token_ids"),
    ({"stop": 3}, "stop is 3; expected a list or tuple"),
    ({"stop_token_ids": "a"}, "stop_token_ids is 'a'; expected a list or tuple"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids is -1; expected an int >= 0"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids is 'a'; expected an int"),
    ({"ignore_eos": 1}, "ignore_eos is 1; expected a bool"),
    ({"skip_special_tokens": None}, "skip_special_tokens is None; expected a bool"),
    ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output is 'no'; expected a bool"),
    ({"logprobs": -1}, "logprobs is -1; expected an int >= 0 or None"),
    ({"logprobs": True}, "logprobs is True; expected an int"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a number > 0"),
    ({"presence_penalty": 2.5}, r"presence_penalty is 2.5; expected a number in \[-2, 2\]"),
    ({"frequency_penalty": -math.inf}, "frequency_penalty is -inf; expected a finite number"),
]


@pytest.mark.parametrize(("kwargs", "message"), INVALID, ids=[str(kwargs) for kwargs, _ in INVALID])
def test_a_bad_value_is_one_line_with_advice(kwargs, message):
    with pytest.raises(ValueError, match=message) as raised:
        SamplingParams(**kwargs)
    _, expected, advice = str(raised.value).split("; ")
    assert "\n" not in str(raised.value)
    assert expected.startswith("expected")
    assert advice


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 0},
        {"temperature": 100},
        {"top_p": 1e-9},
        {"top_p": 1},
        {"top_k": -1},
        {"min_p": 1},
        {"seed": -(2**63)},
        {"max_tokens": None, "min_tokens": 10**6},
        {"max_tokens": 3, "min_tokens": 3},
        {"n": 3, "temperature": 0.1},
        {"logprobs": 0},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"stop": None, "stop_token_ids": None},
    ],
    ids=str,
)
def test_the_edges_of_the_ranges_are_allowed(kwargs):
    params = SamplingParams(**kwargs)
    assert pickle.loads(pickle.dumps(params)) == params


def test_stops_are_kept_as_tuples_of_their_own():
    words = ["a", "b"]
    params = SamplingParams(stop=words, stop_token_ids=[3])
    words.append("c")
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (3,))
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert (SamplingParams().stop, SamplingParams().stop_token_ids) == ((), ())
    assert hash(params) == hash(SamplingParams(stop=["a", "b"], stop_token_ids=(3,)))


def test_replacing_a_field_validates_again():
    params = SamplingParams(stop="ab", min_tokens=4)
    assert dataclasses.replace(params, top_k=5) == SamplingParams(stop="ab", min_tokens=4, top_k=5)
    with pytest.raises(ValueError, match="min_tokens is 4; expected at most max_tokens=3"):
        dataclasses.replace(params, max_tokens=3)


def test_greedy_is_temperature_zero_or_as_good_as():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-9).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_an_unknown_keyword_names_the_nearest():
    with pytest.raises(TypeError, match="SamplingParams has no option 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0)
