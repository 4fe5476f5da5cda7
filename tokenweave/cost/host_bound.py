"""Up to which size a step waits for the host: what CUDA graphs are worth capturing for."""

from __future__ import annotations

from bisect import bisect_left

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk
from tokenweave.weave.plan import BESIDE_SMS

GRAIN = 64  # tokens


def host_bound_tokens(cost: Cost, woven: bool, most: int) -> int:
    """The longest prompt, of at most `most` tokens, that takes the host longer to queue than the device to compute.

    cost: of kernels that are queued one by one. woven: as two halves, each with kernels of its own.
    """
    host_s = cost.host_s(2 if woven else 1)
    waits = bisect_left(range(GRAIN, most + 1, GRAIN), host_s, key=lambda tokens: device_s(cost, tokens, woven))
    return waits * GRAIN


def device_s(cost: Cost, tokens: int, woven: bool) -> float:
    choice = Choice("weave", tokens // 2, BESIDE_SMS, BESIDE_SMS) if woven else Choice("off")
    return Step(cost, Batch([Chunk(tokens)])).device_s(choice)
