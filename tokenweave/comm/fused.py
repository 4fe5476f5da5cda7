"""The fused channel: AllReduce + residual + RMSNorm as one kernel over symmetric memory (`multimem` and `peer`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenweave.comm.communicator import Buffers, Channel, Communicator, Hidden, surviving
from tokenweave.comm.group import PeerError
from tokenweave.comm.norm import Norm
from tokenweave.comm.symmetric import HALVES, Layout, SymmetricMemory
from tokenweave.comm.transport import Transport
from tokenweave.kernels.fused import MAX_BLOCKS, REASONS, Geometry, Launch, Report, Variant
from tokenweave.shard import shards
from tokenweave.waiting import within

HOP_US = 1.0  # what the second shot adds to the first: a store that must arrive before the exit barrier (NVLink)
SM_BYTES_PER_US = 32_000  # what one SM moves: 64 KB in flight, about 2 us under load


class Kernels(Protocol):
    """Launches variants of the kernel on the current lane. The GPU's own: kernels/launcher.py."""

    def geometry(self, variant: Variant) -> Geometry: ...

    def launch(self, variant: Variant, launch: Launch, num_sms: int) -> None: ...


@dataclass(frozen=True)
class Wiring:
    """What all channels of a communicator share."""

    sum: str  # "multimem" | "peer"
    rank: int
    layout: Layout
    memory: SymmetricMemory
    report: Tensor  # uint8 [sizeof(Report)] in host memory that the device uses
    kernels: Kernels
    timeout_s: float
    one_shot_rows: int = 0  # `peer` sums so many rows in one shot, and more in two

    @property
    def world_size(self) -> int:
        return len(self.memory.addresses)


class FusedBuffers(Buffers):
    """What one half communicates through: partial and hidden in symmetric memory, two residuals to alternate between
    (rows that drop out move the others up), and room for a list of rows."""

    def __init__(self, half: int, wiring: Wiring):
        layout, device = wiring.layout, wiring.memory.local.device
        self.partial = layout.rows(wiring.memory.local, layout.partial(half))
        self.hidden = layout.rows(wiring.memory.local, layout.hidden(half))
        shard_rows = -(-layout.max_rows // wiring.world_size)
        most = max(shard_rows, min(wiring.one_shot_rows, layout.max_rows))
        size = (2, most, layout.hidden_size)
        self.residual = torch.empty(size, dtype=layout.dtype, device=device)
        self.listed = torch.empty(layout.max_rows, dtype=torch.int32, device=device)
        self.launch = lasting_arguments(half, wiring)


def lasting_arguments(half: int, wiring: Wiring) -> Launch:
    """The arguments of a half's launches that never change."""
    layout, launch = wiring.layout, Launch()
    for rank, address in enumerate(wiring.memory.addresses):
        launch.place.pad[rank] = address + layout.pad(half)
        launch.place.abort[rank] = address + layout.abort
        launch.partial[rank] = address + layout.partial(half)
        launch.hidden[rank] = address + layout.hidden(half)
    if wiring.memory.multicast:
        launch.partial_multicast = wiring.memory.multicast + layout.partial(half)
        launch.hidden_multicast = wiring.memory.multicast + layout.hidden(half)
    launch.place.report = wiring.report.data_ptr()
    launch.place.timeout_ns = int(wiring.timeout_s * 1e9)
    launch.place.rank = wiring.rank
    launch.place.channel = half
    launch.row_vectors = layout.hidden_size * layout.dtype.itemsize // 16
    return launch


class FusedChannel(Channel):
    """One half's communication in one step. The residual is a shard, or replicated in the one-shot form."""

    def __init__(
        self,
        rows: int,
        half: int,
        buffers: FusedBuffers,
        transport: Transport,
        lane: Any,
        wiring: Wiring,
        sms: Mapping[str, int],
    ):
        super().__init__(rows, half, buffers, transport, lane, wiring.rank)
        self.fused = buffers
        self.wiring = wiring
        self.sms = sms
        self.sum = form_of_sum(wiring, rows)
        self.owners = shards(rows, wiring.world_size)
        self.turn = 0  # which of the two residuals is in use

    def _reduce(self, request: Any) -> Hidden:
        partial = request.partial
        before = self.owners
        listed = request.rows is not None and self.residual is not None
        if request.rows is not None:
            self.owners = surviving(self.owners, request.rows.host)
        variant = self._variant(request, listed)
        residual_in = self.residual
        self.turn ^= listed
        self.residual = self.fused.residual[self.turn][: len(self._mine(self.owners))]
        out = Hidden(self.buffers.hidden[: len(partial)])
        if len(partial):
            launch = self._fill(request, before, residual_in, listed)
            self.wiring.kernels.launch(variant, launch, self._num_sms(variant, request.site))
            self.sent_bytes += self._sent_bytes(len(partial), variant)
        return out

    def _mine(self, owners: list[range]) -> range:
        """The rows whose residual this rank keeps."""
        return range(owners[-1].stop) if self.sum == "one_shot" else owners[self.rank]

    def _variant(self, request: Any, listed: bool) -> Variant:
        layout, given = self.wiring.layout, (request.bias, request.post_norm, request.norm)
        flags = (self.residual is not None, listed, *(part is not None for part in given))
        return variant_of(layout.dtype, layout.hidden_size, self.wiring.world_size, self.sum, *flags)

    def _fill(self, request: Any, before: list[range], residual_in: Tensor | None, listed: bool) -> Launch:
        partial = request.partial
        assert partial.data_ptr() == self.fused.partial.data_ptr(), "partials are written into channel.partial(rows)"
        launch = self.fused.launch
        for rank, owned in enumerate(self.owners):
            launch.first_row[rank] = owned.start
            launch.first_residual[rank] = 0 if self.sum == "one_shot" else before[rank].start
        launch.first_row[len(self.owners)] = self.owners[-1].stop
        assert self.residual is not None
        launch.residual_in = 0 if residual_in is None else residual_in.data_ptr()
        launch.residual_out = self.residual.data_ptr()
        if listed:
            rows = self.fused.listed[: len(request.rows.host)]
            launch.residual_rows = rows.copy_(request.rows.index).data_ptr()
        launch.bias = self._vector(request.bias)
        launch.post_weight, launch.post_eps, launch.post_offset = self._norm(request.post_norm)
        launch.weight, launch.eps, launch.offset = self._norm(request.norm)
        return launch

    def _norm(self, norm: Norm | None) -> tuple[int, float, float]:
        return (0, 0.0, 0.0) if norm is None else (self._vector(norm.weight), norm.eps, norm.offset)

    def _vector(self, vector: Tensor | None) -> int:
        if vector is None:
            return 0
        layout = self.wiring.layout
        if vector.dtype != layout.dtype or vector.shape != (layout.hidden_size,) or vector.data_ptr() % 16:
            raise ValueError(
                f"the fused kernel takes weights {layout.dtype} [{layout.hidden_size}], aligned to 16 bytes, got "
                f"{vector.dtype} {list(vector.shape)}; use comm='sharded'"
            )
        return vector.data_ptr()

    def _num_sms(self, variant: Variant, site: str) -> int:
        """Blocks of the launch: as planned, but none without a row. The same on every rank."""
        most = max(len(owned) for owned in self.owners) if self.sum != "one_shot" else self.owners[-1].stop
        rows_per_block = self.wiring.kernels.geometry(variant).rows_per_block
        return max(1, min(self.sms.get(site, max(self.sms.values())), -(-most // rows_per_block), MAX_BLOCKS))

    def _sent_bytes(self, rows: int, variant: Variant) -> int:
        """What leaves this rank: what others read of it, and what it writes to them."""
        row_bytes = variant.hidden_size * variant.dtype.itemsize
        mine = len(self.owners[self.rank])
        if self.sum == "multimem":  # each row leaves once for the switch to add, and each owned one to be copied
            return (rows + mine) * row_bytes
        if self.sum == "one_shot":
            return rows * row_bytes * (self.wiring.world_size - 1)
        return (rows - mine + mine * (self.wiring.world_size - 1)) * row_bytes


variant_of = functools.cache(Variant)  # a step asks for the same few hundreds of times


class FusedCommunicator(Communicator):
    """Opens channels on symmetric memory. After a report it is poisoned until `reset`, on every rank. An LLM does not
    reset: like all that fails in the middle of a step, a report closes it."""

    def __init__(self, transport: Transport, wiring: Wiring):
        self.transport = transport
        self.rank = wiring.rank
        self.wiring = wiring
        self.poison: PeerError | None = None
        self.why = ""  # of `abort`
        self._report = Report.from_address(wiring.report.data_ptr())
        self._fused = [FusedBuffers(half, wiring) for half in range(HALVES)]
        self._halves: list[Buffers] = [*self._fused]

    def open(self, rows: int, half: int, lane: Any, form: str, sms: Mapping[str, int]) -> Channel:
        """Raises PeerError while poisoned, and after `abort`."""
        self.check()
        if self.why:
            raise PeerError(f"rank {self.rank}: {self.why}")
        if form == "reference":
            return super().open(rows, half, lane, form, sms)
        return FusedChannel(rows, half, self._fused[half], self.transport, lane, self.wiring, sms)

    def check(self) -> None:
        """Raises PeerError if a launch that is done gave up. Costs a look at host memory."""
        if self._report.reason and self.poison is None:  # written last: the rest is there
            self.poison = PeerError(explain(self._report, self.wiring.timeout_s, self.why))
        if self.poison is not None:
            raise self.poison

    def abort(self, why: str) -> None:
        self.why = self.why or why
        self._report.asked = 1

    def reset(self, meet: Callable[[], Any]) -> None:
        """Collective: start again after a report. meet: comes back once every rank has called it."""
        self._wait_for_launches()
        meet()  # nobody's launches are in flight any more
        for part in self.wiring.layout.signals(self.wiring.memory.local):
            part.zero_()
        self.wiring.report.zero_()
        self._wait_for_launches()
        self.poison, self.why = None, ""
        meet()  # everybody's signals are zero

    def _wait_for_launches(self) -> None:
        device = self.wiring.memory.local.device
        if device.type == "cuda":
            within(2 * self.wiring.timeout_s, lambda: torch.cuda.synchronize(device), "this rank's GPU")


def explain(report: Report, timeout_s: float, why: str = "") -> str:
    """What a rank reports, in words. why: this rank's host had its sums give up."""
    reason = REASONS.get(report.reason, f"reason {report.reason}")
    where = f"rank {report.rank}, half {report.channel}, block {report.block}"
    if reason == "aborted":
        asked = REASONS.get(report.seen >> 32) == "asked"
        said = "was told to by its host" if asked else f"waited for rank {report.peer}"
        return f"{where}: rank {report.told_by} gave up, which {said}; look at that rank's output"
    expected, seen = epoch_and_tag(report.expected), epoch_and_tag(report.seen)
    if reason == "asked":
        return f"{where}: told by its host to give up on rank {report.peer} (expected {expected}, seen {seen}): {why}"
    if reason == "mismatch":
        return f"{where}: rank {report.peer} launched a sum of {seen}, this rank one of {expected}; report this"
    return (
        f"{where}: rank {report.peer} did not arrive within {timeout_s:g} s (expected {expected}, seen {seen}); it is "
        "stuck or gone: look at its output"
    )


def epoch_and_tag(word: int) -> str:
    rows, blocks = (word & 0xFFFFFFFF) >> 12, word & 0xFFF
    return f"epoch {word >> 32}: {rows} rows, {blocks} blocks"


def form_of_sum(wiring: Wiring, rows: int) -> str:
    """The kernel's: "multimem", or for `peer` the faster of "two_shot" and "one_shot"."""
    if wiring.sum == "multimem":
        return "multimem"
    return "one_shot" if rows <= wiring.one_shot_rows else "two_shot"


def one_shot_rows(world_size: int, row_bytes: int, sms: int = 8) -> int:
    """Up to how many rows one shot is faster than two, by a model.

    For each row one shot moves W + 3 rows' bytes on every rank (W reads, residual in and out, hidden), two shots
    2 + 2 / W, and one hop more.
    """
    more_bytes = (world_size + 3 - 2 - 2 / world_size) * row_bytes
    return int(HOP_US * sms * SM_BYTES_PER_US / more_bytes)


def report_memory(device: torch.device) -> Tensor:
    """uint8 [sizeof(Report)], zero: host memory that the device can use."""
    return torch.zeros(ctypes.sizeof(Report), dtype=torch.uint8, pin_memory=device.type == "cuda")
