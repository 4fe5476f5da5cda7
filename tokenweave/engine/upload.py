"""Host numbers to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def upload(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays, of int64 and fp32, on `device`, by one copy. Each begins at a multiple of 16 bytes."""
    if device.type == "cpu" or not arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    words = [-(-array.nbytes // 16) * 2 for array in arrays.values()]
    # From pageable memory the copy would wait for everything that is queued on the device.
    packed = torch.empty(sum(words), dtype=torch.long, pin_memory=device.type == "cuda")
    for part, array in zip(np.split(packed.numpy(), np.cumsum(words)[:-1]), arrays.values(), strict=True):
        part.view(array.dtype)[: array.size] = array.reshape(-1)
    parts = packed.to(device, non_blocking=True).split(words)
    return {name: shaped(part, array) for part, (name, array) in zip(parts, arrays.items(), strict=True)}


def shaped(part: Tensor, like: np.ndarray) -> Tensor:
    typed = part if like.dtype == np.int64 else part.view(torch.float32)
    return typed[: like.size].view(like.shape)
