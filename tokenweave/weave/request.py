"""What a strand may ask for: the sums and gathers of tensor parallelism. All that models/ knows of the runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenweave.comm.communicator import Hidden
from tokenweave.comm.norm import Norm

__all__ = ["Gather", "Hidden", "Norm", "Reduce", "Request", "Rows"]


@dataclass(frozen=True)
class Rows:
    """Rows of a half, ascending: as host integers for decisions, and as an index tensor on the device for selecting."""

    host: tuple[int, ...]
    index: Tensor


@dataclass(frozen=True)
class Reduce:
    """Sum the ranks' partials, add to the residual, normalise; the strand gets back a `Hidden`.

    partial: [rows, hidden], this rank's unsummed output of a row-parallel layer.
    rows: only these rows of the half are alive from here on, and `partial` holds them alone; all others drop out of the
        residual. Where the map of rows to owners is sharded, a row stays with the rank that has its residual.

        total = sum over ranks of partial, in rank order (+ bias)
        if post_norm: total = post_norm(total)
        residual = residual + total          # or total, when there is none yet
        hidden = norm(residual) if norm else residual
    """

    partial: Tensor
    bias: Tensor | None = None
    post_norm: Norm | None = None
    norm: Norm | None = None
    rows: Rows | None = None
    site: str = ""  # where in the layer: "embed", "attn", "mlp"; plans and timelines go by it

    def submit(self, channel: Any) -> Any:
        return channel.reduce(self)


@dataclass(frozen=True)
class Gather:
    """Join the ranks' columns: [rows, columns of this rank] becomes [rows, columns of all ranks], on every rank.

    Columns may differ between ranks (ragged). Logits of a vocab-parallel head; sums of squares of a norm across heads.
    """

    part: Tensor
    widths: tuple[int, ...]  # columns of each rank
    site: str = ""

    def submit(self, channel: Any) -> Any:
        return channel.gather(self)


Request = Reduce | Gather
