"""The sums that the embedded model is trained and tested on."""

from zlib import crc32

LIMIT = 1000  # both summands are below it


def held_out(a: int, b: int) -> bool:
    """Whether `a+b` is kept from training: about 2 % of the pairs; `b+a` goes with `a+b`, as one gives the other."""
    return crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 50 == 0


def prompt(a: int, b: int) -> str:
    """What the model is asked."""
    return f"{a}+{b}="


def answer(a: int, b: int) -> str:
    """What it must say before its end-of-sequence token."""
    return str(a + b)


def held_out_pairs() -> list[tuple[int, int]]:
    """Every pair that was kept from training, in numeric order."""
    return [(a, b) for a in range(LIMIT) for b in range(LIMIT) if held_out(a, b)]
