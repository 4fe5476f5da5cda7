"""A request from its tokens to its output: reasons to stop, text, log-probabilities, keys, metrics."""

from __future__ import annotations

import pytest

from tests.checkpoints import BOS, EOS, byte_tokenizer
from tokenweave.engine.request import Prompt, RequestState, start_request
from tokenweave.engine.sampler import GREEDY, History, RowLogprobs
from tokenweave.engine.vocabulary import Vocabulary
from tokenweave.outputs import Logprob
from tokenweave.sampling_params import SamplingParams

VOCABULARY = Vocabulary(byte_tokenizer(), (EOS,))
NO_TEXT = Vocabulary(None, (EOS,))


def request(vocabulary: Vocabulary = VOCABULARY, prompt: str = "12+34=", number: int = 0, **params) -> RequestState:
    asked = SamplingParams(**{"temperature": 0.0, "max_tokens": 8} | params)
    accepted = Prompt(prompt, tuple(prompt.encode()), asked, asked.max_tokens)
    return start_request(number, accepted, 0, 5, vocabulary)


def push(state: RequestState, tokens, index: int = 0):
    """Draw these tokens, as long as the completion goes on; returns its output."""
    one = state.completions[index]
    for token in tokens:
        if one.finish_reason is None:
            one.push(token, None)
    return one.output()


# -- reasons to stop ---------------------------------------------------------------------------------------------------


def test_length():
    output = push(request(max_tokens=3), b"4678")
    assert (output.text, output.finish_reason, output.stop_reason) == ("467", "length", None)
    assert output.token_ids == list(b"467")


def test_a_request_that_goes_on_has_no_reason():
    output = push(request(), b"46")
    assert (output.text, output.finish_reason) == ("46", None)


def test_eos():
    output = push(request(), [*b"46", EOS, *b"7"])
    assert (output.text, output.finish_reason, output.stop_reason) == ("46", "stop", None)
    assert output.token_ids == [*b"46", EOS]


def test_eos_that_is_ignored():
    output = push(request(ignore_eos=True, max_tokens=4), [*b"46", EOS, *b"7"])
    assert (output.text, output.finish_reason) == ("467", "length")


def test_any_of_several_eos_tokens():
    output = push(request(Vocabulary(byte_tokenizer(), (EOS, BOS))), [*b"4", BOS])
    assert output.finish_reason == "stop"


def test_stop_token_ids_are_kept_in_the_text():
    output = push(request(stop_token_ids=[ord("6")]), b"467")
    assert (output.text, output.finish_reason, output.stop_reason) == ("46", "stop", ord("6"))


def test_eos_as_a_stop_token_stops_though_it_is_ignored():
    output = push(request(stop_token_ids=[EOS], ignore_eos=True), [*b"4", EOS])
    assert (output.finish_reason, output.stop_reason) == ("stop", EOS)


def test_a_stop_string_is_cut_off():
    output = push(request(stop=["78", "x"]), b"46789")
    assert (output.text, output.finish_reason, output.stop_reason) == ("46", "stop", "78")
    assert output.token_ids == list(b"4678")


def test_a_stop_string_that_is_kept():
    assert push(request(stop="78", include_stop_str_in_output=True), b"46789").text == "4678"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_turns_out_to_be_none():
    state = request(stop="78")
    assert push(state, b"467").text == "46"
    assert push(state, b"1").text == "4671"


@pytest.mark.parametrize("last", ["length", "eos"])
def test_what_was_held_back_is_text_at_the_end(last):
    output = push(request(stop="78", max_tokens=3), b"467" if last == "length" else [*b"47", EOS])
    assert output.text == ("467" if last == "length" else "47")


def test_a_stop_string_in_the_last_token_wins_over_length():
    assert push(request(stop="7", max_tokens=3), b"467").finish_reason == "stop"


def test_nothing_stops_before_min_tokens():
    """EOS and stop tokens are suppressed by then (and are ordinary tokens, should they come all the same)."""
    output = push(request(stop="4", stop_token_ids=[ord("5")], min_tokens=4), [*b"45", EOS, *b"45"])
    assert output.token_ids == [*b"45", EOS, *b"4"]
    assert (output.finish_reason, output.stop_reason) == ("stop", "4")


def test_half_a_character_is_held_back_and_given_out_at_the_end():
    state = request(max_tokens=3)
    assert push(state, "é".encode()).text == "é"
    assert push(state, "é".encode()[:1]).text == "é\ufffd"
    waiting = request(max_tokens=3)
    assert push(waiting, "é".encode()[:1]).text == ""


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    output = push(request(NO_TEXT), [*b"46", EOS])
    assert (output.text, output.token_ids, output.finish_reason) == ("", [*b"46", EOS], "stop")


def test_an_output_is_a_snapshot():
    state = request(logprobs=1)
    before = push(state, b"4")
    push(state, b"6")
    assert before.token_ids == list(b"4")
    before.token_ids.append(7)
    before.logprobs.append({})
    assert state.completions[0].output().token_ids == list(b"46")
    assert state.completions[0].output().logprobs == []


# -- how tokens are drawn ----------------------------------------------------------------------------------------------


def test_greedy_rows_are_one_shared_object():
    """So a large batch of them is a few bytes to broadcast."""
    assert request().completions[0].row() is GREEDY


def test_a_row_knows_the_position_of_the_token_it_draws():
    state = request(temperature=1.0, seed=3)
    positions = []
    for token in b"46":
        positions.append(state.completions[0].row().position)
        push(state, [token])
    assert positions == [6, 7]


def test_min_tokens_suppresses_every_end_until_they_are_out():
    state = request(min_tokens=2, stop_token_ids=[7])
    suppressed = []
    for token in b"463":
        suppressed.append(state.completions[0].row().suppressed_token_ids)
        push(state, [token])
    assert suppressed == [(7, EOS), (7, EOS), ()]


def test_penalties_see_the_output_so_far():
    state = request(presence_penalty=1.0)
    state.completions[0].slot = 3
    push(state, b"46")
    assert state.completions[0].row().history == History(3, 0, tuple(b"46"))


def test_repetition_sees_the_prompt_too():
    state = request(repetition_penalty=1.5)
    state.completions[0].slot = 3
    assert state.completions[0].row().history == History(3, 0, tuple(b"12+34="), prompt_len=6)


def test_a_row_tells_only_what_is_new():
    state = request(repetition_penalty=1.5)
    one = state.completions[0]
    one.slot = 0
    for token in b"46":
        one.row()
        push(state, [token])
    assert one.row().history == History(0, 7, (ord("6"),), prompt_len=6)
    assert one.row().history == History(0, 8, (), prompt_len=6)


def keys(**options) -> list[int]:
    return [one.key for one in request(temperature=1.0, **options).completions]


def test_a_request_with_a_seed_draws_the_same_whatever_its_number():
    assert keys(seed=3, number=0) == keys(seed=3, number=9)
    assert keys(seed=3) != keys(seed=4)


def test_requests_without_a_seed_differ_from_each_other_and_from_those_with_one():
    assert len({*keys(number=0), *keys(number=1), *keys(seed=5), *keys(seed=0)}) == 4


def test_completions_of_a_request_differ():
    assert len(set(keys(n=4))) == len(set(keys(n=4, seed=1))) == 4
    assert keys(n=4, seed=1)[:2] == keys(n=2, seed=1)


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_a_late_token_counts_where_its_id_does_not():
    state = request(temperature=1.0, min_tokens=2, repetition_penalty=1.5)
    one = state.completions[0]
    one.slot = 0
    push(state, b"4")
    one.sequence.late, one.sequence.drawn_at = 1, 7
    late = one.row()
    assert (late.position, late.suppressed_token_ids) == (8, ())
    assert late.history == History(0, 0, (*b"12+34=", ord("4")), late=7, prompt_len=6)
    one.sequence.late = 0
    push(state, b"6")
    known = one.row()
    assert (known.position, known.suppressed_token_ids) == (8, ())
    assert known.history == History(0, 7, (ord("6"),), prompt_len=6)  # told again, now that it is known


def test_late_tokens_are_of_no_account_to_a_plain_greedy_row():
    state = request()
    state.completions[0].sequence.late = 1
    assert state.completions[0].row() is GREEDY


def test_logprobs_by_token():
    state = request(logprobs=2)
    state.completions[0].push(ord("4"), RowLogprobs([52, 53, 54], [-1.5, -0.5, -1.0], [3, 1, 2]))
    state.completions[0].push(ord("6"), RowLogprobs([54, 53], [-0.25, -2.0], [1, 2]))
    output = state.completions[0].output()
    assert output.cumulative_logprob == -1.75
    assert output.logprobs == [
        {52: Logprob(-1.5, 3, "4"), 53: Logprob(-0.5, 1, "5"), 54: Logprob(-1.0, 2, "6")},
        {54: Logprob(-0.25, 1, "6"), 53: Logprob(-2.0, 2, "5")},
    ]


def test_logprobs_that_were_not_asked_for():
    output = push(request(), b"4")
    assert output.logprobs is None
    assert output.cumulative_logprob is None


# -- the request as a whole --------------------------------------------------------------------------------------------


def test_a_request_is_finished_when_all_its_completions_are():
    state = request(temperature=1.0, n=2, max_tokens=2)
    push(state, b"46", index=1)
    assert not state.output().finished
    push(state, b"99", index=0)
    output = state.output()
    assert output.finished
    assert [(one.index, one.text) for one in output.outputs] == [(0, "99"), (1, "46")]


def test_what_a_request_says_of_itself():
    state = request(number=7)
    state.arrival_s, state.first_scheduled_s, state.first_token_s, state.finished_s = 1.0, 2.0, 3.0, 5.0
    state.cached_tokens = 4
    state.completions[0].sequence.preemptions = 2
    output = state.output()
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("7", "12+34=", list(b"12+34="))
    metrics = output.metrics
    assert (metrics.ttft_s, metrics.latency_s, metrics.cached_tokens, metrics.preemptions) == (2.0, 4.0, 4, 2)
