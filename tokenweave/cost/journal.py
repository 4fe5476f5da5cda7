"""Journal: every measurement, written as it is taken, so that a run that was killed goes on where it stood."""

from __future__ import annotations

import fcntl
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from tokenweave.cost.belief import Case
from tokenweave.cost.choice import Choice
from tokenweave.cost.tuned import Measurement, parse_measurement


class Journal:
    """One JSON line a measurement, after a line that says what the run is. Locked while it is open.

    A line without its end is what a kill leaves behind, and is dropped; any other bad line is refused by name.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        """about: what must be the same for measurements to be of use, else the journal is begun anew.

        Raises ValueError for a broken journal, where there can be none, and while another process has it open.
        """
        self.path = path
        self._known: dict[Case, deque[float]] = defaultdict(deque)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"the folder {str(path.parent)!r} cannot be made: {error.strerror}"
            raise ValueError(f"{why}; name another by --output or TOKENWEAVE_CACHE") from error
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115  (`close` closes it)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(about)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{path} is in use by another `tokenweave tune`; wait for it, or end it") from error
        except BaseException:
            self._file.close()
            raise

    @property
    def known(self) -> int:
        """Measurements of an earlier run that were not asked for yet."""
        return sum(map(len, self._known.values()))

    def measured(self, rows: int, choice: Choice, measure: Callable[[], float]) -> float:
        """Seconds: what an earlier run measured, each once and in its order; then what `measure` gives."""
        if self._known[rows, choice]:
            return self._known[rows, choice].popleft()
        measurement = Measurement(rows, choice, measure())
        self._write(asdict(measurement))
        return measurement.seconds

    def close(self, done: bool = False) -> None:
        """done: nothing is left to go on with."""
        if done:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _read(self, about: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        os.ftruncate(self._file.fileno(), len(whole))
        try:
            first, *lines = [json.loads(line) for line in whole.decode().splitlines()] or [None]
            if first == about:
                for measurement in map(parse_measurement, lines):
                    self._known[measurement.rows, measurement.choice].append(measurement.seconds)
                return
        except ValueError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"the journal {self.path} cannot be used: {said}; delete it to begin anew") from error
        os.ftruncate(self._file.fileno(), 0)
        self._write(about)

    def _write(self, value: Any) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
