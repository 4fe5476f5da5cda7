"""The loop that runs strands in turn, so that one computes while another's sum is on the wire."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from tokenweave.weave.lanes import Finished

Strand = Generator[Any, Any, Any]


def weave(strands: Sequence[Strand], channels: Sequence[Any]) -> list[Any]:
    """Run every strand to its end and return their results, in order. One strand is the plain forward pass.

    First in, first out: the order is correctness, not taste. Half B's attention in layer l comes after half A has
    written its keys and values of layer l, and all ranks submit their collectives in the same order.
    If a strand or a sum raises, the other sums in flight are waited for (bounded) and the error goes up.
    """
    results: list[Any] = [None] * len(strands)
    waiting: deque[tuple[int, Any]] = deque((i, Finished(None)) for i in range(len(strands)))
    try:
        while waiting:
            i, pending = waiting.popleft()
            try:
                request = strands[i].send(pending.wait())
            except StopIteration as done:
                results[i] = done.value
            else:
                waiting.append((i, request.submit(channels[i])))
    except BaseException:
        for _, pending in waiting:
            pending.drain()
        raise
    return results
