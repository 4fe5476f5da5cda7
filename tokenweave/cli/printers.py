"""Printers: how a run is shown, on the way and at its end."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import TextIO

from tokenweave.cli.figures import Run
from tokenweave.cli.record import record
from tokenweave.cli.table import table
from tokenweave.outputs import CompletionOutput, RequestOutput

BOLD, DIM, PLAIN = "\033[1m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class Piece:
    """What was added to one completion."""

    prompt: int
    completion: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


class Printer:
    """Prints completions, when all are there, and the table. The base of the others."""

    streams = False  # whether `update` wants to be called

    def __init__(self, out: TextIO):
        self.out = out

    def update(self, index: int, output: RequestOutput) -> None:
        """Prompt `index` has got this far."""

    def finish(self, run: Run) -> None:
        for prompt, output in zip(run.prompts, run.outputs, strict=True):
            self.write(self._quote(prompt))
            for completion in output.outputs:
                self.write(self._completion(completion, len(output.outputs)) + "\n")
            self.write("\n")
        self.write(table(run))

    def write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _quote(self, prompt: str) -> str:
        return "".join(self._styled(DIM, f"> {line}") + "\n" for line in prompt.splitlines() or [""])

    def _completion(self, completion: CompletionOutput, of: int) -> str:
        number = "" if of == 1 else self._styled(DIM, f"[{completion.index}] ")
        return number + self._styled(BOLD, completion.text)

    def _styled(self, style: str, text: str) -> str:
        plain = not text or "NO_COLOR" in os.environ or not self.out.isatty()
        return text if plain else style + text + PLAIN


class StreamPrinter(Printer):
    """Prints text as it comes: of one completion as it is, of several each piece on a line with its index."""

    streams = True

    def __init__(self, out: TextIO, prompts: list[str], completions: int):
        super().__init__(out)
        self.prompts = prompts
        self.completions = completions
        self._pieces = Pieces()
        self._begun: set[int] = set()

    def update(self, index: int, output: RequestOutput) -> None:
        if index not in self._begun and not self._raw:
            self.write(prefixed(f"[{index}]", self._quote(self.prompts[index])))
        self._begun.add(index)
        for piece in self._pieces.take(index, output):
            self.write(self._show(piece))

    def finish(self, run: Run) -> None:
        self.write(("\n" if self._raw else "") + "\n" + table(run))

    @property
    def _raw(self) -> bool:
        return len(self.prompts) == self.completions == 1

    def _show(self, piece: Piece) -> str:
        if self._raw:
            return piece.text
        index = f"[{piece.prompt}]" if self.completions == 1 else f"[{piece.prompt}.{piece.completion}]"
        return prefixed(index, piece.text)


def prefixed(prefix: str, text: str) -> str:
    """Each line of `text` with `prefix` before it."""
    return "".join(f"{prefix} {line}\n" for line in text.splitlines())


class JsonPrinter(Printer):
    """Prints one JSON object, and with `streams` a JSON line for each piece before it."""

    def __init__(self, out: TextIO, streams: bool):
        super().__init__(out)
        self.streams = streams
        self._pieces = Pieces()

    def update(self, index: int, output: RequestOutput) -> None:
        for piece in self._pieces.take(index, output):
            self.write(json.dumps(vars(piece)) + "\n")

    def finish(self, run: Run) -> None:
        self.write(json.dumps(record(run)) + "\n")


class Pieces:
    """What is new in outputs that each hold everything so far."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[int, int]] = defaultdict(lambda: (0, 0))

    def take(self, index: int, output: RequestOutput) -> list[Piece]:
        """A piece for each completion that has new tokens."""
        pieces = []
        for completion in output.outputs:
            characters, tokens = self._seen[index, completion.index]
            self._seen[index, completion.index] = len(completion.text), len(completion.token_ids)
            text, token_ids = completion.text[characters:], completion.token_ids[tokens:]
            if token_ids:
                pieces.append(Piece(index, completion.index, text, token_ids, completion.finish_reason))
        return pieces


def pick_printer(out: TextIO, prompts: list[str], completions: int, *, json: bool, stream: bool) -> Printer:
    if json:
        return JsonPrinter(out, stream)
    return StreamPrinter(out, prompts, completions) if stream else Printer(out)
