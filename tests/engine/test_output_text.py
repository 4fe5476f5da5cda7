"""A completion's text: the same, whoever reads it and when."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_detokenizer import SPECIAL, encode, expected, kinds, texts, tokenizer_of
from tokenweave import SamplingParams
from tokenweave.engine.output_text import OutputText

NEVER = "\x00 never there"


def text_of(kind: str, prompt: list[int], output: list[int], read_after: set[int], stop: str | None = None) -> str:
    """The whole text, which somebody has read after some of the tokens."""
    text = OutputText(tokenizer_of(kind), prompt, SamplingParams(stop=stop))
    said = ""
    for at, token_id in enumerate(output):
        assert text.push(token_id, scan=True) is None
        if at in read_after:
            assert text.read().startswith(said)
            said = text.read()
    text.finish()
    assert text.read().startswith(said)
    return text.read()


@kinds
@settings(deadline=None, max_examples=60, derandomize=True)
@given(prompt=texts, parts=st.lists(texts, max_size=4), special=st.sampled_from(SPECIAL), data=st.data())
def test_whoever_reads_it(kind, prompt, parts, special, data):
    special_id = tokenizer_of(kind).convert_tokens_to_ids(special)
    prompt_ids, ids = encode(kind, prompt), [token for part in parts for token in (*encode(kind, part), special_id)]
    some = data.draw(st.sets(st.integers(0, len(ids))))
    whole = expected(kind, prompt_ids, ids)
    assert text_of(kind, prompt_ids, ids, set()) == whole
    assert text_of(kind, prompt_ids, ids, some) == whole
    assert text_of(kind, prompt_ids, ids, set(), stop=NEVER) == whole


class Counting:
    """A tokenizer that counts what it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, token_ids, **options):
        self.decoded += 1
        return self.tokenizer.decode(token_ids, **options)


def test_what_nobody_reads_is_decoded_at_the_end():
    tokenizer = Counting(tokenizer_of("byte_level"))
    text = OutputText(tokenizer, encode("byte_level", "The"), SamplingParams())
    before = tokenizer.decoded
    for token_id in encode("byte_level", " quick brown fox" * 20):
        text.push(token_id, scan=True)
    assert tokenizer.decoded == before
    text.finish()
    assert tokenizer.decoded == before + 1
    assert text.read() == " quick brown fox" * 20
