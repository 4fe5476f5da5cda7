import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenweave.engine.detokenizer import MAX_PENDING_TOKENS, REPLACEMENT, Detokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "Größe, naïve café, Ångström; привет, мир; こんにちは世界; 你好，世界。",
    "  indented\n\n\ttabs and   spaces  12+34=46 12+34=46 👍🏽 👩‍👩‍👧 🤷 🤷 ∑∞≠",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "x ",
    "unseen ŵørds 🦜🧵 ∮ 한국어",
    "👍🏽" * 20,
    "x" + " " * 40 + "y",
    "\ufffd legitimate \ufffd\ufffd",
]
SPECIAL = ["<s>", "</s>", "<|tool|>"]


def byte_level() -> Tokenizer:
    """As in GPT-2 and Llama 3: every byte is a token, and merges may end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As in Llama 2: a word's token begins with its space, and unknown characters become byte tokens."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = pre_tokenizers.Split("▁", "merged_with_next")
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizer, words
    trained.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def metaspace() -> Tokenizer:
    """As in sentencepiece's unigram models: the decoder drops the space before the first word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


MAKERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=MAKERS[kind](), bos_token="<s>", eos_token="</s>")


def encode(kind: str, text: str) -> list[int]:
    return tokenizer_of(kind).encode(text, add_special_tokens=False)


def decode(kind: str, token_ids: list[int], skip_special_tokens: bool = True) -> str:
    return tokenizer_of(kind).decode(
        token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def pushed(kind: str, prompt: list[int], output: list[int], skip_special_tokens: bool = True) -> list[str]:
    """The pieces of each push and of finish."""
    detokenizer = Detokenizer(tokenizer_of(kind), prompt, skip_special_tokens)
    pieces = [detokenizer.push(token_id) for token_id in output]
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces


def expected(kind: str, prompt: list[int], output: list[int], skip_special_tokens: bool = True) -> str:
    """What the output adds to the text of the prompt."""
    whole, start = (decode(kind, ids, skip_special_tokens) for ids in (prompt + output, prompt))
    assert whole.startswith(start)
    return whole[len(start) :]


kinds = pytest.mark.parametrize("kind", MAKERS)
texts = st.one_of(
    st.sampled_from(TEXTS), st.text(max_size=30), st.text("aé世👍 \n", max_size=30), st.text("Thequick ", max_size=30)
)


@kinds
def test_the_tokenizers_are_what_they_should_be(kind):
    ids = encode(kind, CORPUS[0])
    assert len(ids) < len(CORPUS[0])
    assert decode(kind, ids) == CORPUS[0]
    bird = encode(kind, "🦜")
    assert any(decode(kind, bird[:count]).endswith(REPLACEMENT) for count in range(len(bird))) == (kind != "metaspace")


@kinds
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "The", "The ", "世界", "👍" * 9])
def test_pieces_are_the_whole_text(kind, text, prompt):
    prompt_ids, ids = encode(kind, prompt), encode(kind, text)
    assert "".join(pushed(kind, prompt_ids, ids)) == expected(kind, prompt_ids, ids)


@kinds
@settings(deadline=None, max_examples=150, derandomize=True)
@given(prompt=texts, parts=st.lists(texts, max_size=4), special=st.sampled_from(SPECIAL), skip=st.booleans())
def test_pieces_are_the_whole_text_with_special_tokens_inside(kind, prompt, parts, special, skip):
    special_id = tokenizer_of(kind).convert_tokens_to_ids(special)
    prompt_ids = [special_id] * 7 + encode(kind, prompt) + [special_id] * (len(prompt) % 9)
    output = [token_id for part in parts for token_id in (special_id, special_id, *encode(kind, part))]
    assert "".join(pushed(kind, prompt_ids, output, skip)) == expected(kind, prompt_ids, output, skip)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@settings(deadline=None, max_examples=150, derandomize=True)
@given(data=st.data(), prompt=texts, skip=st.booleans())
def test_any_tokens_at_all(kind, data, prompt, skip):
    """Invalid UTF-8 of any length and ids outside of the vocabulary included."""
    token_ids = st.integers(0, len(tokenizer_of(kind)) + 3)
    output = data.draw(st.lists(token_ids, max_size=60))
    prompt_ids = encode(kind, prompt)
    assert "".join(pushed(kind, prompt_ids, output, skip)) == expected(kind, prompt_ids, output, skip)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0x41]), max_size=80))
def test_any_bytes_at_all(values):
    """Byte by byte as the standard library decodes them."""
    names = tokenizer_of("byte_level").convert_tokens_to_ids
    token_ids = [names(byte_names()[value]) for value in values]
    text = "".join(pushed("byte_level", [], token_ids))
    assert text == bytes(values).decode(errors="replace")


@pytest.mark.parametrize("invalid", range(3 * MAX_PENDING_TOKENS))
def test_characters_in_long_runs_of_invalid_bytes(invalid):
    values = b"\xff" * invalid + "🦜".encode() + b"\xff" * 2 * MAX_PENDING_TOKENS + "世x".encode()
    token_ids = [tokenizer_of("byte_level").convert_tokens_to_ids(byte_names()[value]) for value in values]
    pieces = pushed("byte_level", [], token_ids)
    assert "".join(pieces) == values.decode(errors="replace")
    silences = "".join("x" if piece else " " for piece in pieces).split("x")
    assert max(map(len, silences)) <= MAX_PENDING_TOKENS


def byte_names() -> list[str]:
    """The byte-level tokens of bytes 0 to 255: printable Latin-1 stands for itself, the others follow at 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


@kinds
@settings(deadline=None, max_examples=100, derandomize=True)
@given(text=texts, prompt=texts)
def test_pieces_are_certain_and_held_back_no_longer_than_needed(kind, text, prompt):
    """After every push: the text so far, but for a character that the next tokens may still finish."""
    prompt_ids, ids = encode(kind, prompt), encode(kind, text)
    detokenizer, whole = Detokenizer(tokenizer_of(kind), prompt_ids), expected(kind, prompt_ids, ids)
    for count, token_id in enumerate(ids, start=1):
        detokenizer.push(token_id)
        so_far = expected(kind, prompt_ids, ids[:count])
        assert whole.startswith(detokenizer.text)
        if REPLACEMENT not in so_far:
            assert detokenizer.text == so_far


@kinds
def test_a_leading_space_depends_on_the_prompt(kind):
    the, quick = encode(kind, "The"), encode(kind, "The quick")[len(encode(kind, "The")) :]
    assert "".join(pushed(kind, the, quick)) == " quick"
    in_the_beginning = "".join(pushed(kind, [], quick))
    assert in_the_beginning == (" quick" if kind == "byte_level" else "quick")
    eos = tokenizer_of(kind).eos_token_id
    assert "".join(pushed(kind, the, [eos] * 3 * MAX_PENDING_TOKENS + quick)) == " quick"
    assert "".join(pushed(kind, the + [eos] * 30, quick)) == " quick"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_that_the_prompt_leaves_unfinished_is_in_the_output(kind):
    ids = encode(kind, "世a🦜🦜b")
    cuts = [cut for cut in range(1, len(ids)) if decode(kind, ids[:cut]).endswith(REPLACEMENT)]
    assert len(cuts) >= 4
    for cut in cuts:
        starts = [decode(kind, ids[:end]) for end in range(cut)]
        start = max((text for text in starts if REPLACEMENT not in text), key=len)
        assert start + "".join(pushed(kind, ids[:cut], ids[cut:])) == "世a🦜🦜b"


def test_complete_characters_stay_when_a_run_of_byte_tokens_turns_invalid():
    ids = encode("byte_fallback", "a世🦜b")
    cut = len(ids) - 2  # the bird lacks its last byte
    assert decode("byte_fallback", ids[:cut]) == "a" + REPLACEMENT * 6
    pieces = pushed("byte_fallback", [], ids[:cut])
    assert "".join(pieces[:-1]) == "a世"
    assert set(pieces[-1]) == {REPLACEMENT}


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, kind: str) -> None:
        self.kind, self.most, self.total = kind, 0, 0

    def decode(self, token_ids: list[int], **options) -> str:
        self.most, self.total = max(self.most, len(token_ids)), self.total + len(token_ids)
        return tokenizer_of(self.kind).decode(token_ids, **options)


@pytest.mark.parametrize(
    ("kind", "unit"),
    [(kind, unit) for kind in MAKERS for unit in ("The quick fox ", "👍", " ", "</s>", "missing")]
    + [("byte_level", "invalid"), ("byte_fallback", "invalid")],
)
def test_work_per_token_does_not_grow(kind, unit):
    invalid = tokenizer_of(kind).convert_tokens_to_ids("ÿ" if kind == "byte_level" else "<0xFF>")
    ids = {"invalid": [invalid], "missing": [10**6]}.get(unit) or encode(kind, unit)
    tokenizer = Counting(kind)
    detokenizer = Detokenizer(tokenizer, encode(kind, "The dog" * 200))
    output = (ids * 2000)[:2000]
    for token_id in output:
        detokenizer.push(token_id)
    assert tokenizer.most <= 2 * MAX_PENDING_TOKENS + 2
    assert tokenizer.total <= len(output) * 2 * MAX_PENDING_TOKENS
