"""Parser: argparse, with bad usage as one line, from rank 0 only."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
from collections.abc import Sequence
from typing import Any, NoReturn

WIDTH = 110


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
            given = unknown[0].partition("=")[0]
            nearest = difflib.get_close_matches(given, self._option_string_actions, n=1)
            self.error(f"unknown option {given}" + (f", did you mean {nearest[0]}?" if nearest else ""))
        return options

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(WIDTH, shutil.get_terminal_size().columns - 2))
