"""`tokenweave bench`, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenweave import LLM, SamplingParams, embedded
from tokenweave.cli import main
from tokenweave.cli.bench import measure, random_prompts
from tokenweave.cli.bench_report import Load, result_of, round_of
from tokenweave.cli.figures import count_woven
from tokenweave.cost.machine import machine_name
from tokenweave.outputs import CompletionOutput, RequestMetrics, RequestOutput

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120
SMALL = ("--device", "cpu", "--rounds", "1", "--num-prompts", "3", "--prompt-len", "5,9", "--output-len", "4")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
TORCHRUN += ("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m")


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """command(*arguments) -> (exit code, stdout, stderr) of `tokenweave bench`, in this process."""
    monkeypatch.setenv("TOKENWEAVE_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        return main(["bench", *map(str, arguments)]), *capfd.readouterr()

    return run


def output_of(first_token_s, finished_s, prompt_tokens, tokens, arrival_s=10.0):
    metrics = RequestMetrics(arrival_s, arrival_s, first_token_s, finished_s, preemptions=1)
    return RequestOutput("0", None, [0] * prompt_tokens, [CompletionOutput(0, "", [0] * tokens)], True, metrics)


# -- what is measured --------------------------------------------------------------------------------------------------


def test_a_round_in_figures():
    found = round_of([output_of(11.0, 14.0, 6, 4), output_of(12.0, 16.0, 10, 3)])
    assert (found.seconds, found.prefill_s, found.decode_s) == (6.0, 2.0, 5.0)
    assert (found.ttft_s, found.tpot_s) == ((1.0, 2.0), (1.0, 2.0))
    assert (found.prefill_tokens_per_s, found.decode_tokens_per_s, found.tokens_per_s) == (8.0, 1.0, 7 / 6)
    assert found.preemptions == 2


def test_a_round_of_single_tokens_has_no_decode():
    found = round_of([output_of(11.0, 11.0, 6, 1)])
    assert (found.tpot_s, found.decode_tokens_per_s) == ((), None)
    result = result_of("off", [found], [found])
    assert (result.tpot_s, result.decode_tokens_per_s, result.gain) == (None, None, 1.0)


def test_the_gain_is_of_the_same_round():
    off, weave = ([round_of([output_of(10.5, 10.0 + s, 6, 2)]) for s in seconds] for seconds in ((2, 4, 9), (1, 4, 3)))
    assert result_of("weave", weave, off).gain == 2.0  # the median of 2, 1 and 3
    assert (result_of("off", off, off).seconds, result_of("weave", weave, off).seconds) == (4.0, 3.0)


@pytest.mark.parametrize("warm_ups", [1, 2])
def test_modes_run_in_turn_and_the_first_rounds_of_each_are_not_counted(warm_ups):
    said, device = [], SimpleNamespace(type="cpu" if warm_ups == 1 else "cuda")

    def generate(prompts, params):
        assert ([len(one) for one in prompts], params.max_tokens, params.ignore_eos) == ([3, 5, 3], 2, True)
        said.append(f"run {len(said)}")
        return [output_of(11.0, 10.0 + len(said), 6, 2)] * 3

    llm = SimpleNamespace(limits=SimpleNamespace(vocab_size=7), plan_by=said.append, generate=generate, device=device)
    rounds = measure(llm, Load((3, 5), 2, 3, 2, seed=0), ("off", "weave"))
    assert said[::2] == ["off", "weave"] * (warm_ups + 2)
    counted = {mode: [one.seconds for one in each] for mode, each in rounds.items()}
    first = 4 * warm_ups + 2
    assert counted == {"off": [first, first + 4], "weave": [first + 2, first + 6]}


def test_prompts_go_by_the_seed():
    first, again, other = (random_prompts(Load((50,), 1, 2, 1, seed), 259) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] != first[1]
    assert all(0 <= token < 259 for prompt in first for token in prompt)


def test_an_llm_changes_its_overlap_between_calls(tmp_path):
    """In which it is woven, and on every rank; the tokens stay the same."""
    woven, texts = [], set()
    with LLM(embedded.path(), tensor_parallel_size=2, device="cpu", trace=str(tmp_path / "t.json")) as llm:
        for overlap in ("off", "weave", "fused", "weave"):
            llm.plan_by(overlap)
            texts.add(llm.generate("12+34=", SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].text)
            woven.append(count_woven(llm.spans)[0])
        with pytest.raises(ValueError, match="overlap must be one of"):
            llm.plan_by("wave")
    assert texts == {"46"}
    assert woven[0] == 0 < woven[1] == woven[2] < woven[3]
    with LLM(embedded.path(), device="cpu", overlap="off") as llm, pytest.raises(ValueError, match="make it with over"):
        llm.plan_by("weave")


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_shape_needs_its_config_alone(command, tmp_path):
    shutil.copy(embedded.path() / "config.json", tmp_path)
    code, out, err = command("--model", tmp_path, "--load-format", "dummy", *SMALL)
    assert (code, err) == (0, "")
    head, figures, notes = out.split("\n\n")
    assert f"{tmp_path}, random weights\n" in head
    assert "3 prompts of 5, 9 tokens at once, 4 generated for each; 1 round after one to warm up\n" in head
    titles, row = (re.split(r"  +", line.strip()) for line in figures.splitlines())
    assert (titles[0], titles[1], titles[-2:]) == ("overlap", "TTFT mean", ["output tok/s", "time"])
    assert (row[0], len(row)) == ("auto", len(titles))
    assert notes.startswith("TTFT, TPOT: ")


def test_overlaps_side_by_side_in_json(command):
    code, out, err = command("--tp", 2, "--overlap", "off,weave", "--json", *SMALL)
    said = json.loads(out)
    assert (code, err) == (0, "")
    assert (said["world_size"], said["load"]["prompt_lens"]) == (2, [5, 9])
    assert said["versions"]["torch"] == torch.__version__
    assert said["machine"] == machine_name(torch.device("cpu"))
    off, weave = said["results"]
    assert (off["overlap"], off["gain"], weave["overlap"]) == ("off", 1.0, "weave")
    assert weave["gain"] == pytest.approx(off["seconds"] / weave["seconds"])
    for one in (off, weave):
        assert one["tokens_per_s"] * one["seconds"] == pytest.approx(3 * 4)  # exact lengths, of the one round
        assert 0 < one["ttft_s"]["p50"] <= one["ttft_s"]["p99"] < one["seconds"]


def test_torchrun_measures_and_prints_once(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENWEAVE_CACHE": str(tmp_path)}
    words = [sys.executable, "-m", *TORCHRUN, "tokenweave.cli", "bench", *SMALL, "--overlap", "fused,off", "--json"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    said = json.loads(done.stdout)
    assert (done.returncode, said["world_size"]) == (0, 2)
    assert [one["overlap"] for one in said["results"]] == ["fused", "off"]


BAD = {
    "argument --prompt-len/--input-len: expected a whole number >= 1, got '0'": ["--prompt-len", "5,0"],
    "argument --rounds: expected a whole number >= 1, got '-1'": ["--rounds", "-1"],
    "argument --overlap: expected some of auto, off, fused, weave, each once": ["--overlap", "off,off"],
    "got 'off,wave'": ["--overlap", "off,wave"],
    "a request of 300 tokens (--prompt-len 200, --output-len 100) is longer than the model's length or "
    "--max-model-len, 256; lower them": ["--input-len", "1,200", "--output-len", "100"],
    "holds no *.safetensors file": ["--model", "."],
    "unknown option --stream": ["--stream"],
    "unknown option --num-iters, did you mean --rounds?": ["--num-iters", "3"],
    "a round of 99,999,999,999,999 prompts and 19,199,999,999,999,808 tokens is too large: at most 100,000 prompts and "
    "100,000,000 tokens; lower --num-prompts, --prompt-len or --output-len": ["--num-prompts", "99999999999999"],
    "a round of 100,000 prompts and 100,050,000 tokens is too large": [
        *("--num-prompts", "100000", "--prompt-len", "936,937", "--output-len", "64")
    ],
    "unexpected argument '12+34='": ["12+34="],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message, command, tmp_path, monkeypatch):
    shutil.copy(embedded.path() / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = command("--device", "cpu", *BAD[message])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("tokenweave: error: ")
    assert message in err


def test_too_large_a_step_is_one_line(command):
    code, out, err = command("--device", "cpu", "--max-num-batched-tokens", 10**12)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "can't allocate memory" in err
    assert err.endswith("; lower --max-num-batched-tokens, --max-num-seqs or --max-model-len\n")
