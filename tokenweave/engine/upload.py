"""Host numbers to the device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [len(values)] on `device`."""
    return _upload(torch.tensor(values, dtype=torch.long), device)


def floats(values: Sequence[float], device: torch.device) -> Tensor:
    """fp32 [len(values)] on `device`."""
    return _upload(torch.tensor(values, dtype=torch.float32), device)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for everything that is queued on the device.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
