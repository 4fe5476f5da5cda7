"""What `python -m perf.gpu` can do without a GPU: every part, tiny, on the CPU; its arithmetic, verdicts and report."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perf import stand_in
from perf.gpu import __main__ as command
from perf.gpu import equality, kernels, rates, report, threads, throughput, two_ranks
from perf.gpu.figure import Figure, spread
from perf.gpu.model import config_folder, greedy, opened, share_weights, twin
from perf.gpu.scale import FULL, TINY
from tokenweave.kernels.fused import Launch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [name for name in command.PARTS if name != "throughput"])
def test_every_part_runs_dry_and_is_kept(name, tmp_path):
    assert command.main(["--dry-run", "--only", name, "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("runtime-one-gpu-*-cpu.json")
    kept = json.loads(file.read_text())
    assert kept["parts"][name]["figures"]
    assert kept["dry"]
    assert {"date", "versions", "commit", "driver"} <= kept.keys()
    text = file.with_suffix(".md").read_text()
    assert "measures nothing" in text
    assert "FAIL" not in text


def test_throughput_beside_transformers_batching(capsys, tmp_path):
    assert command.main(["--dry-run", "--only", "throughput", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "transformers, continuous batching" in said
    assert "tokenweave over transformers" in said


def test_a_peer_that_makes_too_few_tokens_is_no_peer():
    class Result:
        request_id, generated_tokens, error = "req", [1], None

        def is_finished(self):
            return True

    class Manager:
        def add_request(self, ids, max_new_tokens, eos_token_id):
            return "req"

        def get_result(self, timeout):
            return Result()

    throughput.complete(Manager(), [([1], 1)])
    with pytest.raises(RuntimeError, match="made 1 tokens"):
        throughput.complete(Manager(), [([1], 2)])


def test_the_twin_has_our_weights():
    """In fp32 both make the same logits, to rounding."""
    with config_folder(TINY) as folder, opened(TINY, folder, dtype="float32") as llm:
        model = twin(TINY, folder, torch.float32)
        share_weights(llm._runner.model, model)
        tokens = list(llm.generate([1, 2, 3], greedy(6))[0].outputs[0].token_ids)
        assert equality.logits_of(model, [1, 2, 3], tokens).argmax(-1).tolist() == tokens


def test_a_token_that_is_clearly_another_fails_and_a_near_tie_does_not():
    exact = torch.zeros(3, 16)
    exact[:, 3], exact[:, 5] = torch.tensor([10.0, 10.0, 10.0]), torch.tensor([2.0, 9.95, 2.0])
    rounded = exact + 0.05  # so 0.15 is within the bound
    good, bad = torch.tensor([3, 5, 3]), torch.tensor([3, 5, 5])
    assert equality.judged(exact, rounded, good)[0].verdict == "pass"
    first, same, sure, _ = equality.judged(exact, rounded, bad)
    assert (first.verdict, same.value, sure.value) == ("FAIL", pytest.approx(1 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize("scale", [FULL, TINY], ids=["full", "tiny"])
def test_what_a_step_must_do_and_read(scale):
    """Against transformers' own count of parameters, without memory for them."""
    with config_folder(scale) as folder, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    head = scale.shape["vocab_size"] * scale.shape["hidden_size"]
    assert rates.layer_parameters(scale) == matrices - head
    assert rates.decode_bytes(scale, 0, 0) == 2 * matrices
    attention = 4 * scale.shape["hidden_size"] * scale.shape["num_hidden_layers"]  # one query, one key
    assert rates.prefill_flops(scale, 1) == 2 * matrices + attention


def test_keys_and_values_of_8b_take_128_kib_a_token():
    assert rates.decode_bytes(FULL, 2, 100) - rates.decode_bytes(FULL, 0, 100) == 200 * (128 << 10)


def test_parted_tokens_are_judged_by_the_lead_they_gave_up():
    logits = torch.zeros(2, 1, 4)
    logits[0, 0, 1], logits[1, 0, 2], logits[1, 0, 3] = 5.0, 3.0, 2.9
    plain = torch.tensor([[1, 2]])
    near, far = torch.tensor([[1, 3]]), torch.tensor([[0, 2]])
    assert two_ranks.compared([(plain, logits)], [(near, logits)], "")[0].verdict == "pass"
    assert two_ranks.compared([(plain, logits)], [(far, logits)], "")[0].verdict == "FAIL"
    assert two_ranks.compared([(plain, logits)], [(plain, logits)], "")[1].value == 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("part", [equality, two_ranks, stand_in], ids=["equality", "two_ranks", "stand_in"])
def test_tiny_parts_on_a_gpu(part):
    """The code that a CPU does not reach: the joint launch of two ranks, the held kernel, transformers' twin."""
    said: list[Figure] = []
    part.measure(replace(TINY, device="cuda"), said.append)
    assert said
    assert not [figure for figure in said if figure.verdict == "FAIL"]


def test_ranks_launches_are_joined_by_their_stride():
    launches = [Launch() for _ in range(3)]
    for rank, launch in enumerate(launches):
        launch.residual_in, launch.residual_out = 5000 - 64 * rank, 9000 - 64 * rank  # it may run backwards
    assert threads.joined(launches).residual_stride == (1 << 64) - 64
    launches[2].residual_out += 8
    with pytest.raises(ValueError, match="lie at 2 strides, expected one"):
        threads.joined(launches)


def test_a_thread_that_fails_frees_the_others():
    meeting = threads.Meeting(2, timeout_s=60.0)

    def run(rank):
        if rank == 1:
            raise KeyError("rank 1")
        meeting.gather(rank, None)

    with pytest.raises(KeyError, match="rank 1"):
        threads.on_threads(2, torch.device("cpu"), [meeting], run)


def test_a_part_that_fails_keeps_its_figures_and_the_exit_code_tells(tmp_path, monkeypatch, capsys):
    def part(scale, say):
        say(Figure("found before", 1.0, "things"))
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setitem(command.PARTS, "prefill", part)
    arguments = ["--dry-run", "--output", str(tmp_path), "--only"]
    assert command.main([*arguments, "prefill"]) == 1
    monkeypatch.setitem(command.PARTS, "decode", lambda scale, say: say(Figure("later", 2.0, "")))
    assert command.main([*arguments, "decode"]) == 0
    (file,) = tmp_path.glob("*.md")
    text = file.read_text()
    assert "incomplete: RuntimeError: out of luck\n" in text
    assert "found before | 1 things" in text
    assert text.index("## Prefill") < text.index("## Decode")


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (Figure("a", 0.6, "", goal=0.6), "pass"),
        (Figure("a", 0.59, "", goal=0.6), "FAIL"),
        (Figure("a", 1.03, "", goal=1.03, at_most=True), "pass"),
        (Figure("a", 1.04, "", goal=1.03, at_most=True), "FAIL"),
        (Figure("a", float("nan"), "", goal=0.6), "FAIL"),
        (Figure("a", 1.0, ""), ""),
    ],
)
def test_verdicts(figure, verdict):
    assert figure.verdict == verdict
    assert command.failed(report.part_of([figure], "", 0.0)) == (verdict == "FAIL")


def test_the_spread_is_the_median_with_its_ends():
    found = spread("a", [3.0, 1.0, 2.0, 10.0], "s")
    assert (found.value, found.least, found.most) == (2.5, 1.0, 10.0)


def test_the_script_says_what_it_does_and_refuses_what_it_does_not_know():
    script = ["bash", str(ROOT / "perf" / "gpu.sh")]
    helped = subprocess.run([*script, "--help"], capture_output=True, text=True, timeout=60)
    assert helped.returncode == 0
    assert "at most 8 minutes" in helped.stdout
    assert "set -uo" not in helped.stdout
    assert subprocess.run([*script, "--fast"], capture_output=True, timeout=60).returncode == 2


def test_the_script_gives_up_what_no_time_is_left_for(tmp_path):
    """Each part takes this Python two seconds, and all have six: five must be left for the next."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || sleep 2\n')
    python.chmod(0o755)
    environment = os.environ | {"TOTAL_S": "6", "PYTHON": str(python)}
    command = ["bash", str(ROOT / "perf" / "gpu.sh"), "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pass: tests, 2 s" in done.stdout
    assert "FAIL: runtime: decode: skipped, 6 s are over" in done.stdout


def test_time_by_kernel_counts_what_two_streams_do_at_once_a_single_time():
    ran = [
        kernels.Ran("gemm", 0, 10),
        kernels.Ran("sum", 4, 12),
        kernels.Ran("norm", 15, 16),
        kernels.Ran("gemm", 5, 6),
    ]
    assert kernels.busy_and_idle(ran) == (13, 3)
    assert kernels.by_name(ran) == [("gemm", 11, 2), ("sum", 8, 1), ("norm", 1, 1)]
