"""Packing: the inputs of all halves in one buffer, so that one copy brings them to the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from tokenweave.engine.inputs import Inputs

ALIGNMENT_BYTES = 16


def upload(halves: Sequence[Inputs[np.ndarray]], device: torch.device) -> list[Inputs[Tensor]]:
    """All halves' inputs on the device, by one copy that the host does not wait for. On a CPU they are there."""
    if device.type == "cpu":
        return [half.holding(map(torch.from_numpy, half.arrays)) for half in halves]
    return unpack(pack(halves, device).to(device, non_blocking=True), halves)


def pack(halves: Sequence[Inputs[np.ndarray]], device: torch.device) -> Tensor:
    """uint8 [bytes], on the host: all arrays one after the other.

    It is pinned, since from pageable memory a copy waits for all that is queued on the device; and new in each step:
    torch hands pinned memory out again only when copies from it that were queued are done.
    """
    whole = b"".join([array.tobytes().ljust(aligned(array.nbytes), b"\0") for half in halves for array in half.arrays])
    packed = torch.empty(len(whole), dtype=torch.uint8, pin_memory=device.type == "cuda")
    packed.numpy()[:] = np.frombuffer(whole, np.uint8)
    return packed


def unpack(packed: Tensor, halves: Sequence[Inputs[np.ndarray]]) -> list[Inputs[Tensor]]:
    """The inputs as views of what `pack` made of others of the same shapes."""
    arrays = [array for half in halves for array in half.arrays]
    views = (view_of(packed, place, like) for place, like in zip(places_of(arrays), arrays, strict=True))
    return [half.holding([next(views) for _ in half.arrays]) for half in halves]


def places_of(arrays: Sequence[np.ndarray]) -> list[slice]:
    """The bytes of each array in the packed buffer; they depend on shapes alone."""
    sizes = [aligned(array.nbytes) for array in arrays]
    return [slice(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def view_of(packed: Tensor, place: slice, like: np.ndarray) -> Tensor:
    part = packed[place.start : place.start + like.nbytes]
    return part.view(torch.from_numpy(like[:0]).dtype).view(like.shape)
