"""Ranks that an LLM starts itself: in a plain process, with every way for one of them to end."""

import builtins
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import test_llm as calls
from tests.test_bad_input import rewrite
from tests.test_llm import GREEDY, HELLO, OPTIONS, PROMPTS, SAMPLED, tokens, told
from tokenweave import LLM, SamplingParams
from tokenweave.comm.group import PeerError, has_workers
from tokenweave.engine import workers as workers_module
from tokenweave.waiting import wait_until

ROOT = Path(__file__).parents[1]
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
END_S = 30.0  # for a process to end; most need less than one second


def open_two(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **OPTIONS | {"tensor_parallel_size": 2, "num_kv_blocks": 300} | options)


def pids(llm: LLM) -> list[int]:
    assert llm._workers is not None
    return [process.pid for process in llm._workers.processes]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(processes: list[int]) -> None:
    deadline_s = time.monotonic() + END_S
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline_s, "ranks are still running"
        time.sleep(0.05)


# -- calls, with the ranks of one LLM ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(checkpoint) -> Iterator[LLM]:
    with open_two(checkpoint("llama")) as llm:
        yield llm


def one_of_each(llm: LLM) -> list[Any]:
    return [
        told(llm.generate(PROMPTS, GREEDY)),
        told(llm.chat(calls.ASK, GREEDY)),
        told(llm.generate(PROMPTS, SAMPLED)),
    ]


def test_generates_what_it_does_under_torchrun(two, ranks, checkpoint):
    theirs = calls.same(ranks(2).run(calls.with_llm, checkpoint("llama"), one_of_each, (), {}))
    assert one_of_each(two) == theirs


def test_a_new_call_works_however_a_stream_was_left(two):
    results = calls.left_in_every_way(two)
    assert all(result == results[0] for result in results)


def test_refused_calls_leave_the_ranks_in_step(two):
    good = tokens(two.generate(HELLO, GREEDY))
    for prompts, kind in (([], ValueError), ([999], ValueError), (3, TypeError), ("", ValueError)):
        for stream in (False, True):
            with pytest.raises(kind):
                two.generate(prompts, GREEDY, stream=stream)
        assert tokens(two.generate(HELLO, GREEDY)) == good


@pytest.mark.parametrize("world_size", [2, 1, None])
def test_a_second_one_is_refused_while_the_first_is_open(two, checkpoint, world_size):
    with pytest.raises(ValueError, match=r"^an LLM of this process has started ranks of its own and is still open"):
        LLM(checkpoint("llama"), **OPTIONS, tensor_parallel_size=world_size)
    assert len(two.generate(HELLO, GREEDY)) == 1  # the first is none the worse for it


def test_killed_between_calls(two):
    """The last test with these ranks."""
    (victim,) = pids(two)
    os.kill(victim, signal.SIGKILL)
    wait_until_ended([victim])
    with pytest.raises(ConnectionError, match=r"^rank 1 was ended by SIGKILL; its output, if any, is above$"):
        wait_until(lambda: False, END_S, two._runner.check, "a step")  # on CUDA, whose sums just never end
    check_lost(two, lambda: two.generate(HELLO))


# -- lives and deaths -------------------------------------------------------------------------------------------------


def run_script(function: str, *arguments: Any, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """A plain process in an empty folder, whose only way to this package is sys.path, as with scripts that are not
    installed. A module named like torch lies in wait in its folder."""
    (folder / "torch.py").write_text("raise RuntimeError('imported what the caller does not')")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.test_workers import {function} as run; run"
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"{code}(*sys.argv[1:])", *map(str, arguments)],
        cwd=folder,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def traces() -> tuple[int, int, set[str], list[str], bool]:
    """What an open LLM adds to a process: files, native threads, Python's threads, children, and a default group."""
    files, threads = os.listdir("/proc/self/fd"), os.listdir("/proc/self/task")
    return len(files), len(threads), {thread.name for thread in threading.enumerate()}, children(), has_workers()


def children() -> list[str]:
    """The states of this process's children: zombies, too."""
    stats = [Path(f"/proc/{pid}/stat") for pid in os.listdir("/proc") if pid.isdigit()]
    fields = []
    for stat in stats:
        try:
            fields.append(stat.read_text().rpartition(")")[2].split())
        except OSError:  # it has ended since
            continue
    return [state for state, parent, *_ in fields if int(parent) == os.getpid()]


def live(folder: str, broken: str) -> None:
    """One LLM after another, each ended in another way; afterwards no trace of it is left. The last is not closed."""
    failing_block(folder)  # the first loads what stays loaded
    before = traces()
    assert children() == []
    for life in (
        one_rank,
        killed_in_a_call,
        killed_in_an_open_stream,
        worker_that_does_not_start,
        beside_another_group,
    ):
        life(folder)
        check_traces(before, life.__name__)
    bad_model(broken)
    check_traces(before, "bad_model")
    llm = open_two(folder)
    left_open(llm)
    print(*pids(llm))


def check_traces(before: Any, life: str) -> None:
    """A thread that was joined may still be among the system's for a moment."""
    deadline_s = time.monotonic() + END_S
    while (now := traces()) != before and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert now == before, (life, now, before)


def left_open(llm: LLM) -> None:
    """Neither closed, nor its stream read to the end, when the process ends."""
    stream = llm.generate(PROMPTS, GREEDY, stream=True)
    next(stream)
    builtins.left_open = llm, stream


def one_rank(folder: str) -> None:
    with open_two(folder, tensor_parallel_size=1) as llm:
        assert len(llm.generate(PROMPTS, GREEDY)) == len(PROMPTS)


def failing_block(folder: str) -> None:
    llm = open_two(folder)
    ranks = pids(llm)
    with pytest.raises(KeyError), llm:
        calls.raise_at_the_first_part(llm.generate(PROMPTS, LONG, stream=True))
    assert not any(map(is_running, ranks))


def killed_in_a_call(folder: str) -> None:
    llm = open_two(folder)
    (victim,) = pids(llm)
    threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
    check_lost(llm, lambda: llm.generate([PROMPTS[1]] * 5, LONG))


def killed_in_an_open_stream(folder: str) -> None:
    """Closing, in the end, has nobody to tell, and does not complain."""
    llm = open_two(folder)
    stream = llm.generate(PROMPTS, LONG, stream=True)
    next(stream)
    (victim,) = pids(llm)
    os.kill(victim, signal.SIGKILL)
    wait_until_ended([victim])
    llm.close()


def check_lost(llm: LLM, call: Any) -> None:
    start_s = time.monotonic()
    with pytest.raises(PeerError, match=r"^another rank was lost: rank 1 was ended by SIGKILL; .*; make a new LLM$"):
        call()
    assert time.monotonic() - start_s < END_S  # and not the 600 s that a wait may take
    with pytest.raises(
        RuntimeError, match=r"^this LLM cannot be used any more: an earlier call failed; make a new one$"
    ):
        llm.generate(HELLO)
    llm.close()


def bad_model(folder: str) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint .* has no tensor "):
        open_two(folder)


def worker_that_does_not_start(folder: str) -> None:
    executable, sys.executable = sys.executable, "/bin/false"
    try:
        with pytest.raises(RuntimeError, match=r"^the process of rank 1 ended at once; its output is above$"):
            open_two(folder)
    finally:
        sys.executable = executable


def beside_another_group(folder: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"^tensor_parallel_size=2, but this process is one of 1 already "):
        open_two(folder)
    dist.destroy_process_group()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_however_it_ends_nothing_is_left(checkpoint, tmp_path):
    """Under the variables of a torchrun with one process, too, whose store is not for these ranks."""
    of_torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    of_torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    broken = without_a_tensor(checkpoint("llama"), tmp_path / "broken")
    script = run_script("live", checkpoint("llama"), broken, folder=tmp_path, **of_torchrun)
    out, err = script.communicate(timeout=200)
    assert (script.returncode, err) == (0, ""), err
    wait_until_ended([int(pid) for pid in out.split()])


def without_a_tensor(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    rewrite(copy, lambda tensors: tensors.pop("model.norm.weight"))
    return copy


def generate_for_ever(folder: str) -> None:
    with open_two(folder) as llm:
        print(*pids(llm), flush=True)
        while True:
            llm.generate([PROMPTS[1]] * 3, LONG)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_interrupted_and_killed(checkpoint, tmp_path):
    """Ctrl-C goes to all of a terminal's processes, and ends the script as it ends any; SIGKILL leaves it no time."""
    scripts = [run_script("generate_for_ever", checkpoint("llama"), folder=tmp_path) for _ in range(2)]
    ranks = [[int(pid) for pid in script.stdout.readline().split()] for script in scripts]
    assert all(map(is_running, ranks[0] + ranks[1]))
    time.sleep(1.0)
    for script, number in zip(scripts, (signal.SIGINT, signal.SIGKILL), strict=True):
        os.killpg(script.pid, number)
        _, err = script.communicate(timeout=END_S)
        assert script.returncode == -number, err
        if number == signal.SIGINT:
            assert err.startswith("Traceback")
            assert err.endswith("KeyboardInterrupt\n")
            assert err.count("KeyboardInterrupt\n") == 1  # the ranks that it started were not interrupted themselves
            assert "gloo" not in err
            assert "terminate" not in err
        else:
            assert err == ""
    wait_until_ended(ranks[0] + ranks[1])


# -- without starting any ---------------------------------------------------------------------------------------------


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        workers_module.share_cores(10**6)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# -- torchrun ---------------------------------------------------------------------------------------------------------


def torchrun_script(folder: str, broken: str) -> None:
    """Every rank calls the same lines."""
    results = calls.one_after_another(Path(folder))
    with pytest.raises(ValueError, match=" has no tensor "):
        LLM(broken, **OPTIONS)
    with pytest.raises(ValueError, match=r"^tensor_parallel_size=3, but this process is one of 2 already "):
        LLM(folder, **OPTIONS, tensor_parallel_size=3)
    left_open(LLM(folder, **OPTIONS, tensor_parallel_size=2))
    Path(f"rank{os.environ['RANK']}").write_text(str(results))  # two ranks' prints may interleave


def test_torchrun(checkpoint, tmp_path):
    broken = without_a_tensor(checkpoint("llama"), tmp_path / "broken")
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom tests.test_workers import torchrun_script\ntorchrun_script(*sys.argv[1:])\n")
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", "test"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*command, *rendezvous, script, checkpoint("llama"), broken],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
