"""Opened: what an open peer can run. What it cannot is None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perf.overlap.workloads import Arrival


@dataclass(frozen=True)
class Opened:
    """prefill(ids): the first token after a prompt. decode(sequences, context): returns what adds a token to each of so
    many sequences of `context` tokens, any number of times. serve(arrivals): all requests, which are there at once."""

    prefill: Callable[[list[int]], Any] | None = None
    decode: Callable[[int, int], Callable[[], Any]] | None = None
    serve: Callable[[list[Arrival]], Any] | None = None
