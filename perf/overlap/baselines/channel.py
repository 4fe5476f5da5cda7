"""The channel of a baseline: a plain sum, then residual and norm in one pass over the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perf.kernels.peers import add_norm
from tokenweave.comm.communicator import Channel, Communicator, Hidden, add_up, normed
from tokenweave.engine.rank import Rank


class BaselineCommunicator(Communicator):
    """Opens channels of the form "reference" whose sums and norms are those of `kind`."""

    def __init__(self, rank: Rank, kind: type[PlainChannel]):
        runner = rank.runner
        rows, size = runner.config.max_num_batched_tokens, runner.spec.hidden_size
        super().__init__(runner.transport, rank.ranks.rank, rows, size, runner.dtype, rank.ranks.device)
        self.kind = kind
        # One fused kernel on a GPU, for any number of rows; eager torch would take five.
        self.add_norm: Callable[..., None] = (
            torch.compile(add_norm, dynamic=True) if rank.ranks.device.type == "cuda" else add_norm
        )

    def open(self, rows: int, half: int, lane: Any, form: str, sms: Any) -> Channel:
        channel = super().open(rows, half, lane, "reference", sms)
        return self.kind(self, rows, half, channel.buffers, lane)

    def all_reduce(self, total: Tensor) -> int:
        """In place, on every rank; returns the bytes that this rank sent."""
        return self.transport.all_reduce(total)

    @functools.cache  # noqa: B019  (as many as the model has norms)
    def gain(self, norm: Any) -> Tensor:
        return norm.weight + norm.offset if norm.offset else norm.weight


class PlainChannel(Channel):
    """total = sum of the ranks' partials; residual += total; hidden = norm(residual). The residual is replicated."""

    def __init__(self, communicator: BaselineCommunicator, rows: int, half: int, buffers: Any, lane: Any):
        super().__init__(rows, half, buffers, communicator.transport, lane, communicator.rank)
        self.communicator = communicator

    def _reduce(self, request: Any) -> Hidden:
        if request.rows is not None and self.residual is not None:
            self.residual = self.residual.index_select(0, request.rows.index)
        out = self.buffers.hidden[: len(request.partial)]
        fusable = request.bias is None and request.post_norm is None and request.norm is not None
        if fusable and self.residual is not None and len(out):
            self.add_norm(request.partial, self.residual, request.norm, out)
            return Hidden(out)
        self.sent_bytes += self.communicator.all_reduce(request.partial)
        self.residual = add_up(request.partial, self.residual, request)
        return Hidden(normed(self.residual, request.norm, out))

    def add_norm(self, partial: Tensor, residual: Tensor, norm: Any, out: Tensor) -> None:
        """Sum, residual and norm of [rows, hidden], of one row or more."""
        self.sent_bytes += self.communicator.all_reduce(partial)
        self.communicator.add_norm(partial, residual, self.communicator.gain(norm), out, norm.eps)
