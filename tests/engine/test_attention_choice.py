"""Which attention is taken where, and what is said of one that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tokenweave.engine.attention import ATTENTIONS, Site, check_attention, choose, has_nvcc, obstacle, open_attention

H100 = Site("cuda", 90, torch.bfloat16, 128, triton=True, flashinfer=True)
CPU = Site("cpu", 0, torch.float32, 64, triton=True, flashinfer=False)


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (H100, "flashinfer"),
        (replace(H100, flashinfer=False), "triton"),
        (replace(H100, kernels=False), "triton"),
        (replace(H100, dtype=torch.float32), "triton"),
        (replace(H100, head_dim=96), "triton"),
        (replace(H100, capability=75), "torch"),
        (CPU, "torch"),
        (replace(CPU, interpreted=True), "torch"),
    ],
)
def test_auto(site, expected):
    assert choose("auto", site) == expected


@pytest.mark.parametrize(
    ("asked", "site", "reason"),
    [
        ("triton", CPU, "Triton's kernels need a CUDA device, this is cpu"),
        ("triton", replace(CPU, triton=False), "Triton is not installed: pip install tokenweave[cuda]"),
        ("triton", replace(H100, capability=75), "the kernels need compute capability 8.0 or later, this GPU has 7.5"),
        ("flashinfer", CPU, "FlashInfer needs a CUDA device, this is cpu"),
        (
            "flashinfer",
            replace(H100, flashinfer=False),
            "FlashInfer is not installed: pip install tokenweave[flashinfer]",
        ),
        ("flashinfer", replace(H100, dtype=torch.float32), "FlashInfer takes bfloat16 and float16, .* torch.float32"),
        ("flashinfer", replace(H100, head_dim=96), r"FlashInfer takes heads of \(64, 128, 256\) elements, .* have 96"),
        ("flashinfer", replace(H100, kernels=False), "FlashInfer compiles its kernels with nvcc, which is not found"),
        ("flashinfer", replace(H100, triton=False), "Triton is not installed"),
    ],
)
def test_what_cannot_be(asked, site, reason):
    with pytest.raises(
        ValueError, match=rf"^attention='{asked}' cannot run here: .*; attention='auto' takes what can$"
    ):
        choose(asked, site)
    with pytest.raises(ValueError, match=reason.replace("[", r"\[")):
        choose(asked, site)


@pytest.mark.parametrize("asked", ATTENTIONS[1:])
def test_what_is_asked_for_and_can_be(asked):
    assert choose(asked, H100) == asked


def test_torch_runs_anywhere_and_is_never_captured():
    assert obstacle("torch", CPU) is None
    backends = open_attention("auto", torch.empty(2, 1, 2, 4, 1, 8))
    assert not backends.eager.reads_tables
    assert not backends.eager.graphs
    assert backends.captured is None


def test_it_is_refused_before_there_is_a_cache():
    with pytest.raises(ValueError, match="cannot run here"):
        check_attention("flashinfer", torch.device("cpu"), torch.float32, 64)


def test_nvcc_is_found_where_flashinfer_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    before = has_nvcc()  # /usr/local/cuda is looked at, too
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    assert has_nvcc() == before  # not a program yet
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    assert has_nvcc()
