"""Prompts: from arguments, a file or standard input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TextIO

import torch

from tokenweave.comm.group import join

SUMS = ("12+34=", "7+8=", "250+250=", "123+456=", "999+1=")  # what the embedded model is asked when nobody asks
STDIN = "-"


def read_prompts(arguments: Iterable[str], file: str | None, is_embedded: bool, stdin: TextIO) -> list[str]:
    """The arguments' prompts in order, then the file's; "-" stands for the lines of `stdin`.

    Blank lines are no prompts. Raises ValueError for a file that cannot be read, or when there are no prompts.
    """
    arguments = list(arguments)
    if not arguments and file is None and is_embedded:
        return list(SUMS)
    prompts = [line for text in arguments for line in (read_lines(STDIN, stdin) if text == STDIN else [text])]
    prompts += [] if file is None else read_lines(file, stdin)
    if not prompts:
        raise ValueError(
            f"there is no prompt{nowhere(arguments, file)}; give prompts as arguments, lines of --prompts-file FILE, "
            "or - for the lines of standard input"
        )
    return prompts


def nowhere(arguments: list[str], file: str | None) -> str:
    """Where there was none, of the places that were looked at."""
    if STDIN in (*arguments, file):
        return " on standard input"
    return "" if file is None else f" in {file!r}"


def read_lines(path: str, stdin: TextIO) -> list[str]:
    try:
        if path == STDIN:
            return not_blank(stdin)
        with open(path, encoding="utf-8") as lines:
            return not_blank(lines)
    except OSError as error:
        raise ValueError(f"prompts file {path!r} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts in {path!r} are not UTF-8 text ({error}); convert them to UTF-8") from error


def not_blank(lines: Iterable[str]) -> list[str]:
    return [line.rstrip("\n") for line in lines if line.strip()]


def on_every_rank(read: Callable[[], list[str]], timeout_s: float) -> list[str]:
    """What `read` returns, or raises, on rank 0: of several ranks only one can read standard input. Collective."""
    ranks = join(torch.device("cpu"), timeout_s)
    try:
        with ranks.together("reading the prompts"):
            prompts = read() if ranks.rank == 0 else []
        return ranks.gather(prompts)[0]
    finally:
        ranks.leave()
