"""The stand-in for TP=8: its kernel as the host twin (a rank alone, its peers are itself), and its figures."""

from __future__ import annotations

import ctypes
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perf import stand_in
from perf.gpu.figure import Figure
from perf.gpu.scale import TINY
from perf.stand_in_kernel import Held, StandInKernels, Wire, bound, held_source
from tests.comm.twins import GEOMETRY
from tests.kernels.twin import compile_twin
from tokenweave.comm.norm import Norm
from tokenweave.kernels.compiler import CompilerMissing, nvrtc_version
from tokenweave.kernels.fused import Geometry, Variant, geometry, headers
from tokenweave.kernels.jit import cubin
from tokenweave.shard import shards
from tokenweave.weave.lanes import InlineLane
from tokenweave.weave.request import Reduce

WIRE_NS = 2_000_000
# In the place of kernel.cuh: the twin launches what is held, for WIRE_NS.
FAKE = """#pragma once
#include "{kernel}"
{held}
namespace tokenweave {{
template <class S>
void held_for_test(const Launch& launch) {{
  Held held{{launch, {wire_ns}}};
  held_to_wire<S>(held);
}}
}}
#define fused_allreduce_rmsnorm held_for_test
"""


class TwinDevice:
    """Runs launches as threads of this process."""

    def __init__(self, folder: Path, source: Path):
        self.folder, self.source = folder, source
        self.wire_ns: list[int] = []

    def geometry(self, variant: Variant) -> Geometry:
        return GEOMETRY

    def run(self, variant: Variant, held: Held, num_sms: int) -> None:
        self.wire_ns.append(held.wire_ns)
        library = ctypes.CDLL(str(compile_twin(variant, GEOMETRY, self.folder, source=self.source, shared=True)))
        library.tokenweave_launch(ctypes.byref(held.launch), min(num_sms, 2))  # each is 64 threads of this machine


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which compiles the kernel's twin")
    folder = tmp_path_factory.mktemp("twins")
    held = (Path(stand_in.__file__).parent / "stand_in.cuh").read_text()
    (folder / "kernel.cuh").write_text(FAKE.format(kernel=headers() / "kernel.cuh", held=held, wire_ns=WIRE_NS))
    return TwinDevice(folder, folder)


RUNNER = SimpleNamespace(  # what `stand_in.stand_in` needs of one
    ranks=SimpleNamespace(device=torch.device("cpu")),
    config=SimpleNamespace(max_num_batched_tokens=21),
    spec=SimpleNamespace(hidden_size=64),
    dtype=torch.float32,
)


@pytest.mark.parametrize("rows", [21, 16, 3])
def test_a_rank_alone_sums_its_own_rows_and_writes_all(twin, rows):
    """Every row of partial is read once, every row of hidden written: those of shard s are the sum over all shards."""
    kernels = StandInKernels(twin, Wire(lambda rows: 1e-3, lambda rows: rows * 1e-6))
    communicator = stand_in.stand_in(RUNNER, kernels)
    channel = communicator.open(rows, 0, InlineLane(), "sharded", {"mlp": 2})
    norm = Norm(torch.ones(64), 1e-5, 0.0)
    partial = channel.partial(rows)
    mine = len(shards(rows, 8)[0])
    everything = channel.partial(rows + 8)  # past the last row lies room
    everything.copy_(torch.randn(rows + 8, 64))
    residual = torch.zeros(mine, 64)
    for _ in range(2):  # without, then with a residual
        hidden = channel.reduce(Reduce(partial, norm=norm, site="mlp")).wait().data
        residual = residual + torch.stack([everything[s * mine : (s + 1) * mine] for s in range(8)]).sum(0)
        expected = torch.nn.functional.rms_norm(residual, (64,), eps=1e-5)
        for start in range(0, rows, mine):
            stop = min(start + mine, rows)
            assert torch.allclose(hidden[start:stop], expected[: stop - start], atol=1e-5)
    communicator.check()  # nobody gave up: the lone rank met its eight selves
    assert twin.wire_ns[-1] == rows * 1000


def test_the_plain_sum_takes_the_wire_of_an_all_reduce(twin):
    kernels = StandInKernels(twin, Wire(lambda rows: 1e-3 * rows, lambda rows: 0.0))
    communicator = stand_in.stand_in(RUNNER, kernels)
    channel = communicator.open(13, 1, InlineLane(), "reference", {"mlp": 2})
    before = channel.partial(13).copy_(torch.randn(13, 64)).clone()
    channel.reduce(Reduce(channel.partial(13), site="mlp")).wait()
    communicator.check()
    assert twin.wire_ns[-1] == 13_000_000
    assert torch.equal(channel.partial(13), before)  # what it sums goes to a scratch
    assert communicator.transport.scratch[:13].isfinite().all()


def test_a_launch_lasts_as_long_as_its_wire(twin):
    """By the clock that the kernel itself goes by, which may only be late."""
    kernels = StandInKernels(twin, Wire(lambda rows: 0.0, lambda rows: 0.0))
    channel = stand_in.stand_in(RUNNER, kernels).open(8, 0, InlineLane(), "sharded", {"mlp": 1})
    request = Reduce(channel.partial(8).zero_(), norm=Norm(torch.ones(64), 1e-5, 0.0), site="mlp")
    start_ns = time.monotonic_ns()
    channel.reduce(request).wait()
    assert time.monotonic_ns() - start_ns >= WIRE_NS


@pytest.mark.parametrize("rows", [1, 7, 8, 21, 4096])
def test_bounds_are_those_of_the_shards(rows):
    assert [bound(rows, 8, rank) for rank in range(9)] == [*(owned.start for owned in shards(rows, 8)), rows]


@pytest.mark.parametrize("norm", [True, False])
def test_the_held_kernel_compiles_as_large_as_the_real_one(norm, tmp_path, monkeypatch):
    try:
        nvrtc_version()
    except CompilerMissing as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TOKENWEAVE_CACHE", str(tmp_path))
    variant = Variant(torch.bfloat16, 8192, 8, "two_shot", residual=norm, norm=norm, keep=norm)
    for arch in ("sm_80", "sm_90a"):
        assert len(cubin(held_source(variant, geometry(variant)), arch, headers())) > 1000


def test_figures_are_labelled_and_judged_at_4096_tokens_alone():
    ms = {"off": [2.0, 2.0], "fused": [1.5, 1.5], "weave": [1.05, 1.0], "nocomm": [1.0, 1.0]}
    for tokens, verdict, carved in ((4096, "pass", 1.5), (2048, "", 1.5), (4096, "pass", 0.5)):
        found = {figure.what: figure for figure in stand_in.compared(tokens, ms | {"carved weave": [carved] * 2})}
        assert all("the wire is simulated" in figure.note for figure in found.values())
        assert found[f"TP=8, {tokens} tokens, weave over nocomm"].verdict == verdict
        off_over_weave = found[f"TP=8, {tokens} tokens, off over weave"]
        assert off_over_weave.value == pytest.approx(1.95 if carved > 1 else 4.0, abs=0.01)
        assert ("; carved weave" in off_over_weave.note) == (carved < 1), "the faster of the two"
        assert found[f"TP=8, {tokens} tokens, carved weave over weave"].value == pytest.approx(carved, rel=0.05)


def test_weave_is_really_woven_and_nocomm_sends_nothing(tmp_path, monkeypatch):
    said: list[Figure] = []
    plans = []
    plans_of = stand_in.plans_of

    def watched(*arguments):
        plans.append(plans_of(*arguments))
        return plans[-1]

    monkeypatch.setattr(stand_in, "plans_of", watched)
    stand_in.measure(TINY, said.append)
    assert all(plan[mode].cut is not None for plan in plans for mode in stand_in.WOVEN)
    assert all(bool(plan[mode].carved_sms) == (mode == "carved weave") for plan in plans for mode in stand_in.MODES)
    assert all(plan[mode].cut is None for plan in plans for mode in ("off", "fused", "nocomm"))
    assert {figure.what.split(", ")[-1] for figure in said} >= {*stand_in.MODES, "weave over nocomm"}
