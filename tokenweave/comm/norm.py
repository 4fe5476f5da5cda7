"""Norm: the record of one normalisation, and its maths."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """RMSNorm as a record that a fused kernel can read and plain torch can apply.

    `norm(x) = x / sqrt(mean(x^2) + eps) * (offset + weight)`, computed in fp32 and rounded once to `x.dtype`.
    weight: [hidden]; offset: 0 for Llama and kin, 1 for Gemma (its checkpoints store weight - 1).
    """

    weight: Tensor
    eps: float
    offset: float = 0.0
    kind: str = "rms"

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., hidden] of any float dtype; returns the same shape and dtype."""
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scaled = wide * torch.rsqrt(mean_square.add_(self.eps))
        return scaled.mul_(self.weight.float() + self.offset if self.offset else self.weight.float()).to(x.dtype)
