"""Channels: a half's end of the communicator. The contract, and its plainest form, `reference`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenweave.comm.choice import Choice
from tokenweave.comm.transport import Transport
from tokenweave.shard import shards


@dataclass(frozen=True)
class Hidden:
    """What a Reduce gives back: `data` [rows, hidden], valid until the strand's next request.

    scale, unquantised and residual stay None until a quantised output or an exported residual is asked for.
    """

    data: Tensor
    scale: Tensor | None = None
    unquantised: Tensor | None = None
    residual: Tensor | None = None


class Buffers:
    """What one half communicates through, kept between steps: a partial-in and a hidden-out buffer that never alias,
    and the fp32 total of a rank's shard."""

    def __init__(self, max_rows: int, hidden_size: int, world_size: int, dtype: torch.dtype, device: torch.device):
        self.partial = torch.empty(max_rows, hidden_size, dtype=dtype, device=device)
        self.hidden = torch.empty(max_rows, hidden_size, dtype=dtype, device=device)
        self.total = torch.empty(-(-max_rows // world_size), hidden_size, dtype=torch.float32, device=device)


class Channel:
    """One half's communication in one step, over all ranks' rows: the `reference` form.

    The residual is replicated: every rank sums, adds and normalises all rows.
    """

    def __init__(self, rows: int, half: int, buffers: Buffers, transport: Transport, lane: Any, rank: int):
        self.rows = rows
        self.half = half
        self.buffers = buffers
        self.transport = transport
        self.lane = lane
        self.rank = rank
        self.residual: Tensor | None = None
        self.sent_bytes = 0

    def partial(self, rows: int) -> Tensor:
        """[rows, hidden] to write the next partial into (`out=`), so that nothing is copied on the way to the wire."""
        return self.buffers.partial[:rows]

    def reduce(self, request: Any) -> Any:
        return self._submit(functools.partial(self._reduce, request), "sum", request.site, len(request.partial))

    def gather(self, request: Any) -> Any:
        return self._submit(functools.partial(self._gather, request), "gather", request.site, len(request.part))

    def _submit(self, run: Any, kind: str, site: str, rows: int) -> Any:
        return self.lane.submit(run, kind=kind, site=site, half=self.half, rows=rows)

    def _reduce(self, request: Any) -> Hidden:
        total = request.partial
        self.sent_bytes += self.transport.all_reduce(total)
        out = self.buffers.hidden[: len(total)]
        rows = None if request.rows is None else request.rows.index
        self.residual = settle(total, self.residual, request, out, rows)
        return Hidden(out)

    def _gather(self, request: Any) -> Tensor:
        outs = [request.part.new_empty(len(request.part), width) for width in request.widths]
        self.sent_bytes += self.transport.all_gather_columns(request.part, outs)
        return torch.cat(outs, dim=1)


def settle(total: Tensor, residual: Tensor | None, request: Any, out: Tensor, rows: Tensor | None = None) -> Tensor:
    """What follows a sum: add_up, then normed into `out`; on CUDA in one kernel. Returns the residual.

    rows: int64, the rows of the residual that are still alive, one for each of `total`; None: all of them.
    """
    if total.is_cuda:
        from tokenweave.kernels.rms_norm import residual_rms_norm

        return residual_rms_norm(total, residual, out, request.bias, request.post_norm, request.norm, rows)
    if residual is not None and rows is not None:
        residual = residual.index_select(0, rows)
    residual = add_up(total, residual, request)
    normed(residual, request.norm, out)
    return residual


def add_up(total: Tensor, residual: Tensor | None, request: Any) -> Tensor:
    """What follows a sum, on any subset of rows: bias, post_norm, residual. Returns the residual (new, or in place).

    total: [rows, hidden], in the partial's dtype or fp32; it is overwritten. The residual has the partial's dtype.
    """
    if request.bias is not None:
        total.add_(request.bias)
    if request.post_norm is not None:
        total = request.post_norm(total)
    if residual is None:
        return total.to(request.partial.dtype, copy=True)
    return residual.add_(total)


def normed(residual: Tensor, norm: Any, out: Tensor) -> Tensor:
    """out = norm(residual), or the residual itself."""
    return out.copy_(residual) if norm is None else norm(residual, out=out)


class ShardedChannel(Channel):
    """reduce_scatter -> add + norm on this rank's rows -> all_gather: 1/W of the norm work, the residual a shard."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.owners = shards(self.rows, self.transport.world_size)

    def _reduce(self, request: Any) -> Hidden:
        partial = request.partial
        if request.rows is not None:
            self._keep(request.rows)
        mine = self.owners[self.rank]
        total = self.buffers.total[: len(mine)]
        out = self.buffers.hidden[: len(partial)]
        residuals: list[Tensor] = []

        def finish(rows: range) -> None:
            part = slice(rows.start, rows.stop)
            old = None if self.residual is None else self.residual[part]
            residuals.append(settle(total[part], old, request, out[mine.start : mine.stop][part]))

        self.sent_bytes += self.transport.sum_rows(partial, self.owners, total, finish, out)
        if self.residual is None:
            self.residual = torch.cat(residuals) if len(residuals) > 1 else residuals[0]
        return Hidden(out)

    def _keep(self, rows: Any) -> None:
        """Only `rows` stay alive. Each stays with the rank that owns it, so no residual moves; shards become ragged."""
        mine = self.owners[self.rank]
        if self.residual is not None:
            self.residual = self.residual.index_select(0, rows.index[slice_of(rows.host, mine)] - mine.start)
        self.owners = surviving(self.owners, rows.host)


def slice_of(rows: tuple[int, ...], owned: range) -> slice:
    """Where the ascending `rows` fall into `owned`."""
    return slice(sum(row < owned.start for row in rows), sum(row < owned.stop for row in rows))


def surviving(owners: list[range], rows: tuple[int, ...]) -> list[range]:
    """The owners of `rows` alone, renumbered 0..len(rows)-1; each row stays with the rank that had it."""
    slices = [slice_of(rows, owned) for owned in owners]
    return [range(part.start, part.stop) for part in slices]


FORMS = {"reference": Channel, "sharded": ShardedChannel}


class Communicator:
    """Opens channels: one per half and step. `form` is chosen at `open` and fixed for the strand's life."""

    choice = Choice("sharded", "nothing was chosen")  # what forms the sums of "fused" and "weave", and why

    def __init__(
        self, transport: Transport, rank: int, max_rows: int, hidden_size: int, dtype: torch.dtype, device: Any
    ):
        self.transport = transport
        self.rank = rank
        self._halves: list[Buffers] = []
        self._make = lambda: Buffers(max_rows, hidden_size, transport.world_size, dtype, device)

    def open(self, rows: int, half: int, lane: Any, form: str, sms: Mapping[str, int]) -> Channel:
        """The channel of one half of `rows` rows; its sums run on `lane`. sms: how many a kernel may take, by site."""
        while len(self._halves) <= half:
            self._halves.append(self._make())
        return FORMS[form](rows, half, self._halves[half], self.transport, lane, self.rank)

    def check(self) -> None:
        """Raises PeerError if a launch that is done gave up on a rank. Does not wait."""

    def abort(self, why: str) -> None:
        """Have every sum of this rank that waits for another give up, queued ones too; what gives up tells the others.
        Does not wait and calls no driver, so any thread may, whatever the device is at. What gave up is reported by
        `check`, with `why`, a sentence; nothing can be opened afterwards. Other sums end with their groups: see
        Ranks.abort."""
