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

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [..., hidden] of any float dtype; returns the same shape and dtype, written into `out` if given."""
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(self.eps).rsqrt_()
        out = torch.empty_like(x) if out is None else out
        gain = self.weight.float() + self.offset if self.offset else self.weight.float()
        if out.dtype == torch.float32:
            return torch.mul(wide, scale, out=out).mul_(gain)
        return out.copy_((wide * scale).mul_(gain))
