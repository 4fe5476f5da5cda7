"""`tokenweave tune` and `tokenweave calibrate`, run as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tokenweave import embedded
from tokenweave.cli import main
from tokenweave.comm.link import Link
from tokenweave.config import EngineConfig
from tokenweave.cost import calibrate as calibrate_module
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.machine import hardware_key
from tokenweave.engine.at_hand import tuned_plans
from tokenweave.engine.stepper import Stepper

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120
TUNE_ONE = ("tune", "--device", "cpu")
TUNE = ("tune", "--tensor-parallel-size", "2", "--device", "cpu", "--rows", "64", "--link-gbit-per-s", "2")


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def command(capfd):
    """command(*arguments) -> (exit code, stdout, stderr), in this process."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


def start(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tokenweave.cli", *arguments]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


# -- tune --------------------------------------------------------------------------------------------------------------


def test_tune_keeps_what_it_found(command, tmp_path):
    code, out, err = command(*TUNE, "--budget", "10", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert [step["rows"] for step in result["steps"]] == [64]
    assert result["measurements"] >= 4
    assert result["limits"]["chunk_tokens"] == 64
    folder = Path(result["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["limits.json", "rows-64.json"]
    key = hardware_key(torch.device("cpu"), Link(2e9 / 8))
    assert result["key"]["hardware"] == key
    config = EngineConfig(
        str(embedded.path()), device="cpu", tensor_parallel_size=2, link=Link(2e9 / 8), progress=False
    )
    stepper = Stepper(config)
    found = tuned_plans(stepper.rank.runner)
    stepper.close()
    assert found.key.hardware == key
    assert found.lookup(64).mode == result["steps"][0]["choice"]["mode"]


def test_tune_shows_a_table(command):
    code, out, err = command(*TUNE_ONE, "--rows", "16", "--budget", "5")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["rows", "fastest", "time", "unsplit", "gain", "spread", "measured"]
    assert out.splitlines()[1].split()[:2] == ["16", "off"]
    assert "split         never" in out
    assert "written " in out


def test_tune_goes_on_after_a_kill(command, tmp_path):
    many = ("--rows", ",".join(map(str, range(1, 121))), "--output", str(tmp_path / "plans"))
    process = start(*TUNE_ONE, *many, "--budget", "600")
    deadline_s = time.monotonic() + TIMEOUT_S
    try:
        while not (lines := journal_lines(tmp_path)) or len(lines) < 8:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT_S)
    (path,) = (tmp_path / "plans").rglob("journal.jsonl")
    left = path.read_text().splitlines()
    assert not list((tmp_path / "plans").rglob("rows-*.json"))
    code, out, _ = command(*TUNE_ONE, *many, "--budget", "10", "--json")
    assert code == 0
    result = json.loads(out)
    found = [m for step in result["steps"] for m in step["measured"]]
    for line in map(json.loads, left[1:-1]):  # what was measured before the kill is not measured again
        assert line in found
    assert not path.exists()


def journal_lines(tmp_path):
    paths = list((tmp_path / "plans").rglob("journal.jsonl"))
    return paths[0].read_text().splitlines() if paths else []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "0"), "argument --budget: expected a number > 0 and at most 1e+09, got '0'"),
        (("--budget", "nan"), "argument --budget: expected a number > 0 and at most 1e+09, got 'nan'"),
        (("--rows", "x"), "expected row counts with commas between, such as 256,512,1024; got 'x'"),
        (("--rows", "0,4"), "--rows must be between 1 and 128, the largest step"),
        (("--rows", "4096"), "--rows must be between 1 and 128, the largest step"),
        (("--model", "/nowhere"), "/nowhere"),
        (("--budgt", "3"), "unknown option --budgt, did you mean --budget?"),
        (("--link-latency-us", "3"), "give --link-gbit-per-s as well"),
        (("--comm", "peer"), "comm"),
        (("--output", "/dev/null"), "cannot be made: Not a directory; name another by --output or TOKENWEAVE_CACHE"),
    ],
)
def test_tune_refuses_in_one_line(command, arguments, message):
    code, out, err = command("tune", "--device", "cpu", "--max-num-batched-tokens", "128", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("tokenweave: error: ")
    assert err.count("\n") == 1


def test_tune_of_one_rank_splits_nothing(command):
    code, out, _ = command("tune", "--device", "cpu", "--rows", "16", "--budget", "5", "--json")
    assert code == 0
    result = json.loads(out)
    assert [step["choice"]["mode"] for step in result["steps"]] == ["off"]
    assert result["limits"]["split_threshold"] is None


def test_a_broken_plan_is_refused_by_name(command):
    code, out, _ = command("tune", "--device", "cpu", "--rows", "16", "--budget", "5", "--json")
    path = Path(json.loads(out)["folder"]) / "rows-16.json"
    path.write_text(path.read_text()[:40])
    code, out, err = command("tune", "--device", "cpu", "--rows", "16", "--budget", "5")
    assert (code, out) == (2, "")
    assert str(path) in err
    assert "delete it and run `tokenweave tune` again" in err
    assert err.count("\n") == 1


# -- calibrate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _small(monkeypatch):
    sizes = {"rows": (16,), "gemms": ((64, 64),), "prompts": (32,), "heads": (2, 1, 16), "copy_bytes": (1 << 16,)}
    monkeypatch.setitem(calibrate_module.SIZES, "cpu", sizes)
    monkeypatch.setattr(calibrate_module, "POINT_S", 0.01)


@pytest.mark.usefixtures("_small")
def test_calibrate_shows_and_keeps_the_record(command, tmp_path):
    code, out, err = command("calibrate", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["what", "size", "dtype", "measured", "rate", "model", "error"]
    assert "not measured: one rank" in out
    path = Path(out.splitlines()[-1].split(maxsplit=1)[1])
    assert path.is_relative_to(tmp_path / "cache" / "calibration")
    own = tmp_path / "own.json"
    code, out, err = command("calibrate", "--device", "cpu", "--output", own, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["path"] == str(own)
    assert find_hardware(own).name == record["hardware"]["name"] == find_hardware(path).name
    assert all(point["seconds"] > 0 for point in record["points"])


def test_calibrate_has_torchrun_start_ranks(monkeypatch, command, tmp_path):
    """Only what would be started: the measurement on two ranks itself is in tests/cost/test_calibrate.py."""
    started = []

    def fake_run(arguments, *, stdout, env):
        started.append((arguments, env))
        return subprocess.CompletedProcess(arguments, len(started) - 1)

    monkeypatch.setattr(subprocess, "run", fake_run)
    arguments = (
        "calibrate",
        "--tensor-parallel-size",
        "4",
        "--device",
        "cpu",
        "--output",
        tmp_path / "a.json",
        "--json",
    )
    assert command(*arguments)[0] == 0
    (asked, environment), rest = started[0], ("--output", str(tmp_path / "a.json"), "--json")
    assert asked[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert asked[5:9] == ["4", "-m", "tokenweave.cli", "calibrate"]
    assert [each for each in rest if each not in asked] == []
    assert environment["OMP_NUM_THREADS"] == "1"
    code, _, err = command(*arguments)
    assert code == 1
    assert "the ranks failed with exit code 1; their output is above" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "record.txt"), "--output must name a .json file, got record.txt"),
        (
            ("--tensor-parallel-size", "0"),
            "argument --tp/--tensor-parallel-size: expected a whole number >= 1, got '0'",
        ),
        (("--device", "cuda"), "device='cuda', but torch sees no CUDA device"),
    ],
)
def test_calibrate_refuses_in_one_line(command, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, out, err = command("calibrate", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("_small")
def test_a_broken_calibration_is_refused_by_name(command):
    _, out, _ = command("calibrate", "--device", "cpu", "--json")
    path = Path(json.loads(out)["path"])
    path.write_text("{")
    for arguments in (("calibrate",), ("tune", "--rows", "16")):
        code, out, err = command(*arguments, "--device", "cpu")
        assert (code, out) == (2, "")
        assert str(path) in err
        assert "delete it and run `tokenweave calibrate` again" in err
