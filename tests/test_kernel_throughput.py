"""The arithmetic of perf/kernel_throughput.py, and that it runs."""

import json
from dataclasses import replace

import pytest

from perf import kernel_throughput as throughput
from perf.kernel_throughput import Kernel, Published
from tokenweave.kernels.inspect_cubin import Instruction, find_tool

KERNEL = Kernel("multimem", 8, 200, 256, 64 << 10, 4, 1, 64 << 10, 1000, 3400.0, 1700.0)
KNOWN = Published({8192: {2: 1571.0}}, 3.0, 1.5, 0.04096, 13.0)


def test_floor():
    rows = 8192
    assert throughput.floor_us(KERNEL, rows) == pytest.approx(rows * 16384 * 9 / 8 / 450e3)
    assert throughput.floor_us(replace(KERNEL, sum="two_shot", world_size=2), rows) == pytest.approx(
        rows * 16384 / 450e3
    )
    assert throughput.floor_us(replace(KERNEL, sum="two_shot"), rows) == pytest.approx(rows * 16384 * 1.75 / 450e3)


def test_littles_law():
    # 512 rows for each of 2 CTAs, 4 at a time, each time the latency and a refill of 1 us.
    assert throughput.flight_us(KERNEL, 8192, 2, 3.0) == pytest.approx(128 * 4)
    peers = replace(KERNEL, sum="two_shot", bytes_in_flight=128 << 10, refill_clocks=0.0)
    assert throughput.flight_us(peers, 8192, 2, 3.0) == pytest.approx(512 * 3)


def test_issue():
    assert throughput.issue_us(KERNEL, 8192, 2) == pytest.approx(128 * 2)
    code = [Instruction(16 * k, "FADD", 2, None, frozenset({1} if k < 3 else ())) for k in range(100)]
    assert throughput.issue_clocks(code, warps=8) == 200 + 3 * throughput.NEAR_WAIT_CLOCKS
    assert throughput.issue_clocks(code, warps=16) == 400
    assert throughput.refill_clocks(code, warps=16) == 0
    code[49] = replace(code[49], text="@P0 LDGMC.E.ADD.F32x4.RN.STRONG.SYS R4, [R2.64]")
    assert throughput.refill_clocks(code, warps=16) == 200


def test_the_slowest_part_decides():
    found = throughput.predict(KERNEL, 8192, 2, KNOWN)
    assert found.slow_us == pytest.approx(512 + 13)
    assert found.fast_us == pytest.approx(335.5 + 13, abs=0.1)  # by the links
    assert found.tokenweave_us == 1571
    assert throughput.predict(KERNEL, 8192, 4, KNOWN).tokenweave_us is None


def test_targets():
    lines = throughput.verdicts(KERNEL, KNOWN)
    assert [line.split("**")[1] for line in lines] == ["met", "met", "met"]
    slow = replace(KNOWN, link_row_us=0.06, fused_row_us=6.0)
    assert [line.split("**")[1] for line in throughput.verdicts(KERNEL, slow)] == [
        "met",
        "met only at the fast latency",
        "missed",
    ]


def test_blocks_per_sm():
    assert throughput.blocks_per_sm(128, 256, 0) == 2
    assert throughput.blocks_per_sm(129, 256, 0) == 1
    assert throughput.blocks_per_sm(32, 256, 100 << 10) == 2


def test_published(tmp_path):
    (tmp_path / "tokenweave_figure_10.csv").write_text(
        "num_tokens,hidden_size,num_tokens_per_gpu,fused_arln_us_ctas_2,fused_arln_us_ctas_4\n"
        "64,8192,18,23,17\n8192,8192,600,1500,900\n16384,8192,1200,3036,1800\n"
    )
    (tmp_path / "tokenweave_figure_7.csv").write_text(
        "BL,hidden_size,multimem_ar_us_ctas_2,multimem_ar_us_ctas_4\n64,8192,1,1\n8192,8192,100,50\n16384,8192,1124,562\n"
    )
    found = throughput.read_published(tmp_path)
    assert found.fused_us[8192] == {2: 1500, 4: 900}
    assert found.fused_row_us == pytest.approx(16 * 1536 / 8192)
    assert found.plain_row_us == pytest.approx(16 * 1024 / 8192)
    assert found.link_row_us == pytest.approx(512 / 8192)
    assert found.fixed_us == pytest.approx(17 - 64 * 512 / 8192)


def test_it_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cuda.bindings", reason="needs NVRTC")
    if not (find_tool("nvdisasm") and find_tool("cuobjdump")):
        pytest.skip("needs nvdisasm and cuobjdump, from Triton's wheel or a CUDA toolkit")
    monkeypatch.setenv("TOKENWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(throughput, "WAYS", (("multimem", 8), ("two_shot", 2)))
    throughput.main(["--json", "--output", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert [kernel["bytes_in_flight"] for kernel in found] == [64 << 10, 128 << 10]
    assert all(kernel["registers"] <= 255 and kernel["blocks_per_sm"] >= 1 for kernel in found)
    assert "Predictions, not measurements" in (tmp_path / throughput.REPORT).read_text()
