"""Problem: what is summed and normalised, and random data for it that every rank can draw for all ranks."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenweave.comm.symmetric import Layout


@dataclass(frozen=True)
class Problem:
    """Sums of up to [max_rows, hidden_size] on one device of each rank."""

    hidden_size: int
    dtype: torch.dtype
    max_rows: int
    device: torch.device
    eps: float = 1e-5

    @property
    def layout(self) -> Layout:
        return Layout(self.max_rows, self.hidden_size, self.dtype)


@functools.lru_cache(maxsize=128)
def drawn(problem: Problem, name: str, rows: int | None = None) -> Tensor:
    """[rows, hidden] or [hidden], standard normal. The same on every rank. Not to be written to."""
    seed = zlib.crc32(name.encode())
    size = (problem.hidden_size,) if rows is None else (rows, problem.hidden_size)
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values.to(problem.dtype).to(problem.device)
