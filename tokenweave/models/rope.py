"""Rope: rotary position embeddings, with the scalings that checkpoints ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenweave.models.spec import DecoderSpec

SCALINGS = ("default", "linear", "llama3", "yarn", "dynamic")


class Rope:
    """cos and sin of the rotation angles for a half's tokens, fp32.

    Frequencies of the static scalings come from transformers, which defines them. "dynamic" depends on a length: a
    token at position p of a sequence whose prompt has n tokens is rotated for length max(n, p + 1), which is what
    transformers does for a prompt in one piece followed by decoding, and does not depend on how the prompt is chunked.
    """

    def __init__(self, spec: DecoderSpec, config: Any, max_model_len: int, device: torch.device):
        self.kind = spec.rope.get("rope_type", "default")
        if self.kind not in SCALINGS or spec.rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"rope parameters {dict(spec.rope)} are not supported; supported types: {SCALINGS}")
        self.theta = float(spec.rope["rope_theta"])
        self.head_dim = spec.head_dim
        self.max_position = spec.max_position
        self.factor = float(spec.rope.get("factor") or 1.0)
        frequencies, self.scaling = self._static(config)
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
        self.cos, self.sin = (table.to(device) for table in self._tables(angles))

    def __call__(self, half: Any) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [tokens, 1, head_dim] fp32, of the half's positions."""
        if self.kind == "dynamic" and max(half.rope_lengths) > self.max_position:
            # Pinned: from pageable memory the copy would wait for everything that is queued on the device.
            lengths = torch.tensor(half.rope_lengths, dtype=torch.float32, pin_memory=self.cos.is_cuda)
            lengths = lengths.to(self.cos.device, non_blocking=True)
            angles = half.positions[:, None].float() * self._dynamic(lengths)
            cos, sin = self._tables(angles)
        else:
            cos, sin = self.cos.index_select(0, half.positions), self.sin.index_select(0, half.positions)
        return cos[:, None], sin[:, None]

    def _static(self, config: Any) -> tuple[Tensor, float]:
        if self.kind in ("default", "dynamic"):
            return 1.0 / self.theta ** self._exponents(torch.device("cpu")), 1.0
        return ROPE_INIT_FUNCTIONS[self.kind](config, torch.device("cpu"))

    def _dynamic(self, lengths: Tensor) -> Tensor:
        """[tokens, head_dim / 2]: NTK-aware frequencies, the base grown with each token's length."""
        stretch = self.factor * lengths.clamp_min(self.max_position) / self.max_position - (self.factor - 1)
        base = self.theta * stretch ** (self.head_dim / (self.head_dim - 2))
        return 1.0 / base[:, None] ** self._exponents(lengths.device)

    def _exponents(self, device: torch.device) -> Tensor:
        return torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim

    def _tables(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((angles, angles), dim=-1)
        return both.cos() * self.scaling, both.sin() * self.scaling


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x: [tokens, heads, head_dim]; returns x * cos + cat(-x2, x1) * sin, in x's dtype (maths in fp32)."""
    cos, sin = rotary
    middle = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :middle].addcmul_(x[..., middle:], sin[..., :middle], value=-1)
    rotated[..., middle:].addcmul_(x[..., :middle], sin[..., middle:])
    return rotated.to(x.dtype)
