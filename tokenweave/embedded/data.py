"""The embedded model's training data: sums as token ids, and how often each is drawn."""

from collections.abc import Iterator
from itertools import product

import torch

from tokenweave.embedded.problems import LIMIT, answer, held_out, prompt
from tokenweave.embedded.tokenizer import BOS, EOS, PAD, VOCABULARY

LENGTH = len("<999+999=1998>")  # the longest sum, with < for the beginning and > for the end of the sequence
IGNORED = -100  # cross_entropy's default ignore_index


def encode(pairs: list[tuple[int, int]]) -> torch.Tensor:
    """int64 [pairs, LENGTH]: beginning, prompt, answer, end, then padding."""
    ids = {"<": VOCABULARY[BOS], ">": VOCABULARY[EOS], "_": VOCABULARY[PAD], **VOCABULARY}
    table = torch.tensor([ids.get(chr(code), 0) for code in range(128)])
    text = "".join(f"<{prompt(a, b)}{answer(a, b)}>".ljust(LENGTH, "_") for a, b in pairs)
    return table[torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()].view(-1, LENGTH)


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """int64 [rows, LENGTH - 1]: the token to be said at each position, IGNORED outside the answer and its end."""
    answered = (ids == VOCABULARY["="]).cumsum(1)[:, :-1].bool() & (ids[:, 1:] != VOCABULARY[PAD])
    return torch.where(answered, ids[:, 1:], IGNORED)


def places_that_pass_a_carry_on(a: int, b: int) -> int:
    return sum(a // ten % 10 + b // ten % 10 == 9 for ten in (1, 10, 100))


def weight(a: int, b: int) -> float:
    """How often to draw a pair: rare digit lengths more than their number, and what carries may run through."""
    if held_out(a, b):
        return 0.0
    pairs_as_long = 10.0 ** (len(str(a)) + len(str(b)))
    return (1 + places_that_pass_a_carry_on(a, b)) / pairs_as_long**0.5


def batches(batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless int64 [batch, LENGTH], drawn with replacement from the pairs that are not held out."""
    pairs = list(product(range(LIMIT), range(LIMIT)))
    ids = encode(pairs)
    chances = torch.tensor([weight(a, b) for a, b in pairs], dtype=torch.float64).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.rand(batch, generator=generator, dtype=torch.float64) * chances[-1]
        yield ids[torch.searchsorted(chances, drawn, right=True)]
