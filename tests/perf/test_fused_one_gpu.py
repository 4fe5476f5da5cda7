"""What perf/gpu.sh can do without a GPU: the dry run, the arithmetic of its tables, the naive kernel as threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from perf import fused_one_gpu, fused_speed, gemm_loss
from perf.naive import naive_source
from perf.virtual import bounds_of
from tests.kernels.twin import Scenario, compile_twin, run_twin, twin_folder, wrong
from tokenweave.kernels.compiler import CompilerMissing, nvrtc_version
from tokenweave.kernels.fused import Geometry, Variant, headers

FACTS = {
    "date": "2026-01-02", "gpu": "NVIDIA H100 80GB", "sms": 132, "driver": "1", "cuda": "13.0", "nvrtc": "13.0",
    "python": "3", "versions": {"torch": "2"}, "commit": "0",
}  # fmt: skip


def test_the_dry_run_compiles_every_kernel(capsys, tmp_path, monkeypatch):
    try:
        nvrtc_version()
    except CompilerMissing as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TOKENWEAVE_CACHE", str(tmp_path))
    assert fused_one_gpu.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    for world_size in (2, 4, 8):
        for kernel in ("fused", "plain", "naive"):
            assert f"compiled for sm_90a: {kernel}, W={world_size}, " in said


def test_the_naive_kernel_computes_the_same(tmp_path_factory, tmp_path):
    """As the twin of a kernel.cuh that has the naive kernel in the fused one's place."""
    variant = Variant(torch.bfloat16, 520, 4, "two_shot", residual=True, norm=True)
    body = naive_source(variant).partition('#include "kernel.cuh"\n')[2].partition("using namespace")[0]
    fake = tmp_path / "kernel.cuh"
    swap = "#define fused_allreduce_rmsnorm naive_allreduce_rmsnorm\n"
    fake.write_text(f'#pragma once\n#include "{headers() / "kernel.cuh"}"\n{body}\n{swap}')
    given = Scenario(variant, Geometry(64, 1), 37, [[2], [1], [3]])
    folder = twin_folder(tmp_path_factory)
    assert wrong(given, run_twin(compile_twin(variant, given.layout, folder, source=tmp_path), given, folder)) is None


def test_rows_are_shared_out_as_the_runtime_does():
    assert bounds_of(10, 4) == [0, 3, 6, 8, 10]


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("rows", fused_speed.ROWS)
def test_launches_are_enough_to_leave_the_cache_and_have_buffers_of_their_own(world_size, rows):
    launches = fused_speed.launches_of(world_size, rows)
    moved = fused_speed.moved_bytes("plain", world_size, rows)
    slots = min(launches, max(fused_speed.ROWS) // rows)
    assert rows % world_size == 0  # or shards of several launches would not fit beside each other
    assert slots * moved > 300 << 20  # several times the 50 MB of an H100


def test_layer_shapes():
    found = {(shape.name, shape.n, shape.k) for shape in gemm_loss.shapes()}
    assert ("8B qkv", 6144, 4096) in found
    assert ("70B/8 gate_up", 7168, 8192) in found
    assert ("70B/8 o", 8192, 1024) in found
    assert len(gemm_loss.shapes()) == 16


def test_the_report_says_pass_and_fail_and_keeps_parts_of_the_same_day(tmp_path: Path):
    def point(what: str, ctas: int, us: float) -> dict:
        moved = fused_speed.moved_bytes(what, 8, 4096)
        found = fused_speed.Point(what, 8, 4096, ctas, us, us, us, moved)
        return fused_speed.asdict(found) | {"gb_per_s": found.gb_per_s}

    points = [point("fused", 4, 100.0), point("plain", 4, 95.0), point("naive", 4, 170.0), point("torch", 0, 50.0)]
    loss = gemm_loss.Loss("8B qkv", 2048, 4, "cublas", 100.0, 105.0, 10.0, None)
    losses = [gemm_loss.asdict(loss) | {"gemm_loss": loss.gemm_loss, "fused_loss": loss.fused_loss}]
    stem = fused_one_gpu.stem_of(tmp_path, FACTS)
    fused_one_gpu.write(stem, FACTS, {"speed": {"copy_gb_per_s": 3000.0, "points": points}}, {})
    figures, failures = fused_one_gpu.kept(stem, ["gemms"])
    fused_one_gpu.write(stem, FACTS, figures | {"gemms": {"sms": 132, "losses": losses}}, failures | {"gemms": "cut"})
    text = stem.with_suffix(".md").read_text()
    assert "pass: W=8, 4096 rows, 4 CTAs: of the bytes/s of our all-reduce without the norm (of its time: 0.95)" in text
    assert "FAIL: W=8, 4096 rows, 4 CTAs: times as fast as the naive kernel: 1.700 (goal 1.800)" in text
    assert "pass: GEMMs lose to 4 of 132 SMs (0.030), cublas: 0.050 (goal 0.080)" in text
    assert "- incomplete: gemms: cut" in text
    assert "| torch | all | 50.0 " in text
    assert json.loads(stem.with_suffix(".json").read_text())["parts"]["speed"]["points"] == points
    assert stem.with_suffix(".csv").read_text().count("\n") == 1 + len(points)
