"""Dummy weights: random ones in place of a checkpoint's (load_format="dummy"), to measure a shape without its files."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from tokenweave.models.weights import Load, Source

LOGIT_STD = 3.0  # of an LM head's logits: greedy text that neither stands still nor hangs on near-ties


def fill(loads: Iterable[Load], norm_offset: float = 0.0) -> None:
    """Fill every `into` with its part of a whole tensor that is drawn on its device from a generator seeded by the
    tensor's name. So all ranks hold parts of one model, the same one for any number of ranks on one kind of device.

    Matrices [..., in] are normal with a standard deviation of 1 / sqrt(in), embeddings and LM heads, which may be one,
    of LOGIT_STD / sqrt(in); gains of norms are 1 (stored as 1 - norm_offset); biases are 0.
    """
    for load in loads:
        source = load.sources[0]
        size = source.shape or tuple(load.into.shape)
        if len(size) == 1:
            load.into.fill_(0.0 if source.name.endswith(".bias") else 1.0 - norm_offset)
        else:
            load.into.copy_(drawn(source, size, load.into)[source.index])


def drawn(source: Source, size: tuple[int, ...], like: Tensor) -> Tensor:
    """The whole tensor [*size]."""
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(source.name.encode()))
    gain = LOGIT_STD if any(name in source.name for name in ("lm_head", "embed_tokens")) else 1.0
    std = gain * size[-1] ** -0.5
    return torch.empty(size, dtype=like.dtype, device=like.device).normal_(0.0, std, generator=generator)
