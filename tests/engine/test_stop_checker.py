import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.engine.stop_checker import StopChecker


def run(pieces: list[str], stop: list[str], include_stop_str: bool = False) -> tuple[list[str], str | None]:
    """What comes out after each piece and at the end, and the stop string."""
    checker = StopChecker(stop, include_stop_str)
    out = [checker.push(piece) for piece in pieces]
    return [*out, checker.finish()], checker.matched


def reference(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete, the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("pieces", "stop", "out", "matched"),
    [
        (["ab", "cd"], [], ["ab", "cd", ""], None),
        (["ab", "cd"], ["bc"], ["a", "", ""], "bc"),
        (["ab", "xcd"], ["bc"], ["a", "bxcd", ""], None),
        (["ab", ""], ["bc"], ["a", "", "b"], None),
        (["a\n", "\n", "\nb"], ["\n\n"], ["a", "", "", ""], "\n\n"),
        (["aaab"], ["aab"], ["a", ""], "aab"),
        (["aa", "aa", "b"], ["aab"], ["", "aa", "", ""], "aab"),
        (["abcd"], ["abcd", "bc"], ["a", ""], "bc"),
        (["a", "b", "c", "d"], ["abcd", "bc"], ["", "", "a", "", ""], "bc"),
        (["xabc"], ["bc", "abc"], ["x", ""], "abc"),
        (["one. two. ", "three."], ["two", "one"], ["", "", ""], "one"),
    ],
)
def test_what_comes_out_when(pieces, stop, out, matched):
    assert run(pieces, stop) == (out, matched)


def test_the_stop_string_can_stay():
    assert run(["xa", "b", "cy"], ["abc"], include_stop_str=True) == (["x", "", "abc", ""], "abc")


def test_nothing_comes_out_behind_a_stop_string():
    assert run(["a.b", "c", "d"], ["."]) == (["a", "", "", ""], ".")


def test_stop_strings_that_end_before_min_tokens_are_text():
    checker = StopChecker(["ab", "xabc"])
    assert checker.push("abxab", scan=False) == "ab"
    assert checker.matched is None
    assert checker.push("d") == "xabd"
    assert checker.matched is None
    assert checker.push("ab") == ""
    assert checker.matched == "ab"


def test_a_stop_string_that_does_not_count_is_not_held_back():
    assert StopChecker(["ab"]).push("ab", scan=False) == "ab"


def test_a_stop_string_may_begin_before_min_tokens_and_end_after():
    checker = StopChecker(["ab"])
    assert [checker.push("xa", scan=False), checker.push("b")] == ["x", ""]
    assert checker.matched == "ab"


words = st.text("ab", min_size=1, max_size=4)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(words, max_size=3), st.booleans())
def test_any_pieces_give_the_text_before_the_first_stop_string(pieces, stop, include_stop_str):
    out, matched = run(pieces, stop, include_stop_str)
    text, expected = reference("".join(pieces), stop)
    assert ("".join(out), matched) == (text + (expected or "" if include_stop_str else ""), expected)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(words, max_size=3))
def test_no_more_is_held_back_than_a_stop_string_could_need(pieces, stop):
    checker, text, out = StopChecker(stop), "", ""
    for piece in pieces:
        text += piece
        out += checker.push(piece)
        if checker.matched is None:
            held = text.removeprefix(out)
            assert text == out + held
            assert held == "" or any(word.startswith(held) and word != held for word in stop)
