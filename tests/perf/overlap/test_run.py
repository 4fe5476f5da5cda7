"""The command itself on two ranks over a paced link: it measures, is interrupted, and goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

from perf.overlap import goals
from perf.overlap.modes import MODES
from perf.overlap.silent import NotingTransport, SilentTransport, note

ROOT = Path(__file__).parents[3]
POINTS = "--measures prefill timeline decode mix --prompts 32 --batches 2 --mixes quick-chat --rounds 1"
COMMAND = [sys.executable, "-m", "perf.overlap", "--quick", "--link", "paced", "--threads", "2", *POINTS.split()]
MARK = "TOKENWEAVE_TEST_MARK"
DEADLINE_S = 120


def start(folder: Path, mark: str) -> subprocess.Popen:
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, "--out", str(folder)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def marked(mark: str) -> list[str]:
    """Every process that the command started, and what they started, that is still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(path.parent.name)
        except (PermissionError, FileNotFoundError, ProcessLookupError):  # of others, or just gone
            continue
    return found


def wait_for(condition) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_interrupted_and_resumed(tmp_path):
    journal, mark = tmp_path / "journal.jsonl", uuid.uuid4().hex
    with start(tmp_path, mark) as command:
        wait_for(lambda: journal.exists() or command.poll() is not None)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=DEADLINE_S)
    assert command.returncode == 130, said.decode()
    assert b"the same command goes on from here" in said
    wait_for(lambda: not marked(mark))

    before = len(journal.read_text().splitlines())
    with start(tmp_path, mark) as command:
        out, said = command.communicate(timeout=DEADLINE_S)
    assert command.returncode == 0, said.decode()
    assert b"report.md" in out
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert before >= 1
    assert len(keys) == len(set(keys)) == 4  # what was measured before is not measured again
    check_results(json.loads((tmp_path / "results.json").read_text()))


def check_results(results: dict) -> None:
    by_measure = {point["measure"]: point for point in results["points"]}
    controls = {"communication alone", "off, sleeps only", "weave, sleeps only"}
    for measure in ("prefill", "decode"):
        seconds = by_measure[measure]["seconds"]
        assert by_measure[measure]["cpu_s"].keys() == seconds.keys()
        assert seconds.keys() == MODES.keys() | controls
        assert all(0 < value < 60 for values in seconds.values() for value in values)
    assert goals.PEER in by_measure["prefill"]["missing"]
    assert by_measure["mix"]["figures"].keys() == MODES.keys()
    for figures in by_measure["mix"]["figures"].values():
        (p50,), (p90,), (p99,) = (figures[f"E2E p{percent}"] for percent in (50, 90, 99))
        assert 0 < p50 <= p90 <= p99
        assert figures["TTFT p50"] <= figures["E2E p50"]


def test_nothing_is_sent_and_nothing_is_forgotten():
    class Counting(SilentTransport):
        calls: list

        def all_reduce(self, total):
            self.calls.append(("all_reduce", tuple(total.shape)))
            return super().all_reduce(total)

        def all_gather_columns(self, part, outs):
            self.calls.append(("all_gather_columns", [tuple(out.shape) for out in outs]))
            return super().all_gather_columns(part, outs)

    def step(transport):
        transport.all_reduce(torch.ones(4, 8))
        transport.all_gather_columns(torch.ones(1, 2), [torch.ones(1, 2), torch.ones(1, 2)])

    again = note(0, 2, step)
    counting = Counting(0, 2)
    counting.calls = []
    sent_bytes = again(counting)
    assert counting.calls == [("all_reduce", (4, 8)), ("all_gather_columns", [(1, 2), (1, 2)])]
    assert sent_bytes == 4 * 8 * 4 + 2 * 4
    assert isinstance(NotingTransport(0, 2), SilentTransport)
