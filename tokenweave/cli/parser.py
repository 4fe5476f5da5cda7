"""Parser: argparse, with bad usage as one line, from rank 0 only."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
from collections.abc import Sequence
from typing import Any, NoReturn

WIDTH = 110
# What options of vLLM's benchmarks and engine are called here, where the nearest name would mislead.
NAMED_BY_VLLM = {
    "batch-size": "num-prompts",
    "num-iters": "rounds",
    "num-gpu-blocks-override": "num-kv-blocks",
    "random-input-len": "prompt-len",
    "random-output-len": "output-len",
}


class UsageError(ValueError):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError instead of exiting, and whose help comes from rank 0 alone."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Options and positionals in any order. Raises UsageError, naming the nearest option for an unknown one."""
        options, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            self.error(self._refusal(unknown[0]))
        return options

    def _refusal(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}"
        given, names = word.partition("=")[0], {option.lstrip("-"): option for option in self._option_string_actions}
        word = NAMED_BY_VLLM.get(given.lstrip("-"), given.lstrip("-"))
        nearest = difflib.get_close_matches(word, names, n=1)
        return f"unknown option {given}" + (f", did you mean {names[nearest[0]]}?" if nearest else "")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(WIDTH, shutil.get_terminal_size().columns - 2))
