"""Virtual ranks: W ranks played by one GPU. Each has its part of one allocation, laid out as symmetric memory is."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tokenweave.comm.fused import Wiring, lasting_arguments
from tokenweave.comm.symmetric import HALVES, Layout, SymmetricMemory
from tokenweave.kernels.fused import Launch, Report, Variant
from tokenweave.kernels.launcher import Launcher
from tokenweave.shard import shards


class VirtualRanks:
    """partial[half], hidden[half]: [ranks, max_rows, hidden]; residual_in[half], residual_out[half]: [ranks,
    residual_rows, hidden], of each rank its shard (in one shot: all rows). All on the device, and not initialised.

    residual_rows: the most that a rank keeps. shared_residual: one of them serves as both, as it does in a channel.
    """

    def __init__(
        self,
        world_size: int,
        layout: Layout,
        device: torch.device,
        timeout_s: float,
        residual_rows: int,
        shared_residual: bool = True,
    ):
        self.world_size = world_size
        self.layout = layout
        self.device = device
        self.memory = torch.empty(world_size, layout.total_bytes, dtype=torch.uint8, device=device)
        self.reports = torch.zeros(world_size, ctypes.sizeof(Report), dtype=torch.uint8, pin_memory=True)
        self.launcher = Launcher(device, lambda task: contextlib.nullcontext())
        self.wirings = [self._wiring(rank, timeout_s) for rank in range(world_size)]
        self.partial = [self._of_all_ranks(layout.partial(half)) for half in range(HALVES)]
        self.hidden = [self._of_all_ranks(layout.hidden(half)) for half in range(HALVES)]
        size = (HALVES, world_size, residual_rows, layout.hidden_size)
        self.residual_in = torch.empty(size, dtype=layout.dtype, device=device)
        self.residual_out = self.residual_in if shared_residual else torch.empty_like(self.residual_in)
        self.reset()

    def reset(self) -> None:
        """Signals, abort words and reports as before the first launch. Nothing may be in flight."""
        for part in self.memory:
            for signals in self.layout.signals(part):
                signals.zero_()
        self.reports.zero_()
        torch.cuda.synchronize(self.device)

    def reported(self) -> list[Report]:
        """Every rank's report. Synchronise first."""
        return [Report.from_buffer_copy(report.numpy().tobytes()) for report in self.reports]

    def arguments(self, half: int, bounds: Sequence[int], first_row: int = 0, first_kept: int = 0) -> Launch:
        """The arguments of one launch for all ranks, or for one after `place.rank` and `place.report` are set.

        bounds: rank r owns rows bounds[r] up to bounds[r + 1]. first_row, first_kept: where these rows begin in the
        partials and hidden states, and in the residuals.
        """
        launch = lasting_arguments(half, self.wirings[0])
        row_bytes = self.layout.hidden_size * self.layout.dtype.itemsize
        for rank in range(self.world_size):
            launch.partial[rank] += first_row * row_bytes
            launch.hidden[rank] += first_row * row_bytes
        for rank, row in enumerate(bounds):
            launch.first_row[rank] = row
        launch.residual_in = self.residual_in[half, 0, first_kept].data_ptr()
        launch.residual_out = self.residual_out[half, 0, first_kept].data_ptr()
        launch.residual_stride = self.residual_in.stride(1) * self.layout.dtype.itemsize
        return launch

    def launch(self, variant: Variant, launch: Launch, num_sms: int) -> None:
        """All ranks at once, `num_sms` blocks each."""
        self.launcher.launch(variant, launch, num_sms, virtual_ranks=self.world_size)

    def _wiring(self, rank: int, timeout_s: float) -> Wiring:
        addresses = tuple(part.data_ptr() for part in self.memory)
        memory = SymmetricMemory(self.memory[rank], addresses)
        return Wiring("peer", rank, self.layout, memory, self.reports[rank], self.launcher, timeout_s)

    def _of_all_ranks(self, offset: int) -> Tensor:
        values = self.memory.view(self.layout.dtype)
        size = (self.world_size, self.layout.max_rows, self.layout.hidden_size)
        strides = (values.stride(0), self.layout.hidden_size, 1)
        return values.as_strided(size, strides, offset // self.layout.dtype.itemsize)


def bounds_of(rows: int, world_size: int) -> list[int]:
    """Where each rank's rows begin, and where the last one's end."""
    return [0, *accumulate(map(len, shards(rows, world_size)))]
