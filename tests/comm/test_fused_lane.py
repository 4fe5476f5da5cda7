"""The fused channel on the comm lane: its sums allocate nothing and run one small copy beside the kernel, at most."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from tokenweave.comm.fused import FusedCommunicator, Wiring, report_memory
from tokenweave.comm.norm import Norm
from tokenweave.comm.symmetric import Layout, SymmetricMemory
from tokenweave.comm.transport import LocalTransport
from tokenweave.kernels.fused import Geometry, Launch, Variant
from tokenweave.weave.accesses import AccessMode, storage_address
from tokenweave.weave.lanes import InlineLane
from tokenweave.weave.request import Reduce, Rows

ROWS, HIDDEN = 12, 64


@dataclass
class NotedKernels:
    """Launches nothing."""

    launches: list[tuple[Variant, int]] = field(default_factory=list)

    def geometry(self, variant: Variant) -> Geometry:
        return Geometry(32, 2)

    def launch(self, variant: Variant, launch: Launch, num_sms: int) -> None:
        self.launches.append((variant, num_sms))


def open_noted(kernels: NotedKernels, one_shot_rows: int) -> FusedCommunicator:
    layout = Layout(ROWS, HIDDEN, torch.float32)
    local = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    memory = SymmetricMemory(local, (local.data_ptr(),) * 2)
    report = report_memory(torch.device("cpu"))
    return FusedCommunicator(LocalTransport(), Wiring("peer", 0, layout, memory, report, kernels, 1.0, one_shot_rows))


@pytest.mark.parametrize("one_shot_rows", [0, ROWS])
def test_sums_allocate_nothing_and_take_the_sms_of_the_plan(one_shot_rows):
    kernels = NotedKernels()
    communicator = open_noted(kernels, one_shot_rows)
    norm, kept = Norm(torch.ones(HIDDEN), 1e-6), (2, 7, 11)
    rows = Rows(kept, torch.tensor(kept))
    channel = communicator.open(ROWS, 1, InlineLane(), "sharded", {"attn": 3, "mlp": 2})
    fresh: list[str] = []
    memory = (communicator.wiring.memory.local, channel.fused.residual, channel.fused.listed)
    known = {storage_address(tensor) for tensor in memory}
    sums = (("embed", ROWS, None), ("attn", ROWS, None), ("mlp", ROWS, None), ("attn", 3, rows))

    def note(op: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        fresh.extend(op for tensor in writes if storage_address(tensor) not in known)

    with torch.inference_mode(), AccessMode(note):
        for site, count, listed in sums:
            hidden = channel.reduce(Reduce(channel.partial(count), norm=norm, rows=listed, site=site)).wait()
            assert hidden.data.data_ptr() == channel.buffers.hidden.data_ptr()
    assert fresh == []
    assert [sms for _, sms in kernels.launches] == [3, 3, 2, min(3, 2 if one_shot_rows else 1)]
