"""On CUDA the kernels are Triton's; on a CPU nobody needs it. So what has kernels for CUDA imports them where it has
seen that its tensors are there, and everything can be imported without Triton."""

import importlib.util

import torch


def check_triton(device: torch.device) -> None:
    """Raises RuntimeError where kernels will be needed and Triton is not installed."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise RuntimeError("a model on CUDA needs Triton, which is not installed: pip install tokenweave[cuda]")
