"""Standard output, kept for what the command itself has to say."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def own_stdout(speaks: bool) -> Iterator[TextIO]:
    """Standard output for the command alone; a null device for a rank that does not speak.

    Meanwhile descriptor 1 leads to stderr, because libraries in C++ (gloo, NCCL) print there, and would spoil JSON.
    A character that the terminal's encoding lacks is written as an escape.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        target = os.dup(saved) if speaks else os.open(os.devnull, os.O_WRONLY)
        with open(target, "w", encoding=sys.stdout.encoding, errors="backslashreplace") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
