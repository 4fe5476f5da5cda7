"""launch/ssh.sh with an `ssh` that runs the command here and a stub for Python: what it starts, shows and stops."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "ssh.sh"
TIMEOUT_S = 60
SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
shift
exec sh -c "$*"
"""
# In the place of python launch/ranks.py: says what it was given, then does as FILE.<node rank> says.
PYTHON = """#!/usr/bin/env bash
while (($#)); do
    case $1 in --node-rank) node=$2 ;; esac
    words+=("$1") && shift
done
printf 'node %s got' "$node"; printf ' <%s>' "${words[@]}"; printf '\\n'
echo "$$" >"$TOKENWEAVE_TEST/pid.$node"
source "$TOKENWEAVE_TEST/do.$node"
"""


@pytest.fixture
def place(tmp_path):
    for name, text in {"ssh": SSH, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for node in range(2):
        (tmp_path / f"do.{node}").write_text("exit 0")
    return tmp_path


def start(place, *arguments):
    environment = os.environ | {"PATH": f"{place}:{os.environ['PATH']}", "TOKENWEAVE_TEST": str(place)}
    words = [SCRIPT, "--hosts", "one,me@two", "--nproc", "4", "--python", place / "python", *arguments]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def run(place, *arguments):
    return finish(start(place, *arguments))


def pids(place):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not all((place / f"pid.{node}").is_file() and (place / f"pid.{node}").read_text() for node in range(2)):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return [int((place / f"pid.{node}").read_text()) for node in range(2)]


def assert_ended(processes):
    """Soon: a process that was just ended may still be there as a zombie."""
    deadline_s = time.monotonic() + 10
    for pid in processes:
        while Path(f"/proc/{pid}/status").is_file() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline_s, f"{pid} still runs"
            time.sleep(0.05)


def test_every_host_gets_its_number_and_the_program_word_by_word(place, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth 0")
    (place / "do.1").write_text('echo "over $NCCL_SOCKET_IFNAME"; echo oops >&2')
    code, out, err = run(place, "--", "my script.py", "it's", "", "$HOME *", "--nproc", "9")
    assert code == 0, err
    lines = out.splitlines()
    for node, host in enumerate(("one", "me@two")):
        words = (
            f"launch/ranks.py --nnodes 2 --node-rank {node} --nproc-per-node 4 --master-addr one --master-port 29500"
        )
        program = "<--> <my script.py> <it's> <> <$HOME *> <--nproc> <9>"
        assert f"[{host}] node {node} got {' '.join(f'<{word}>' for word in words.split())} {program}" in lines
    assert "[me@two] over eth 0" in lines
    assert "[me@two] oops" in lines
    assert "2 hosts of 4 ranks each; they meet at one:29500" in err


def test_a_failure_stops_the_others(place):
    (place / "do.0").write_text("exec sleep 100")
    (place / "do.1").write_text(f'while [[ ! -s "{place}/pid.0" ]]; do sleep 0.05; done; echo no luck; exit 3')
    code, out, err = run(place)
    assert code == 3
    assert "[me@two] no luck" in out.splitlines()
    assert "tokenweave: me@two ended with exit code 3; what it reported is above" in err
    assert "stopping the others" in err
    assert_ended(pids(place))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_stops_all(place, number, code):
    for node in range(2):
        (place / f"do.{node}").write_text("exec sleep 100")
    process = start(place)
    started = pids(place)
    os.kill(process.pid, number)
    assert finish(process)[0] == code
    assert_ended(started)


def test_even_a_killed_script_leaves_nothing(place):
    for node in range(2):
        (place / f"do.{node}").write_text("exec sleep 100")
    process = start(place)
    started = pids(place)
    process.kill()
    assert_ended(started)
    finish(process)


def test_a_limit_of_time(place):
    (place / "do.1").write_text("exec sleep 100")
    code, _, err = run(place, "--timeout-s", "2")
    assert code == 124
    assert "stopping all hosts: 2 s are over" in err
    assert_ended(pids(place))


def test_a_host_that_cannot_be_reached(place):
    (place / "ssh").write_text('#!/bin/sh\necho "ssh: no route to host" >&2\nexit 255\n')
    code, out, err = run(place)
    assert code == 255
    assert "no route to host" in out
    assert "ended with exit code 255" in err


def test_a_dry_run_prints_what_a_shell_would_run(place):
    code, out, _ = run(place, "--dry-run", "--master-addr", "10.0.0.1", "--", "a.py", "b c")
    first, second = (shlex.split(line) for line in out.splitlines())
    assert code == 0
    assert (first[0], first[-2], second[-2]) == ("ssh", "one", "me@two")
    shell, option, inner = shlex.split(second[-1])
    assert (shell, option) == ("bash", "-c")
    assert "--node-rank 1 --nproc-per-node 4 --master-addr 10.0.0.1 --master-port 29500 -- " in inner
    assert "29500 -- a.py 'b c' </dev/null" in inner
    assert not list(place.glob("pid.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nproc", "many"), "--nproc must be a whole number such as 8, not 'many'; see --help"),
        (("--hosts", "a,,b"), "--hosts has an empty or odd name ''; see --help"),
        (("--hosts", "a,-oProxyCommand=x"), "--hosts has an empty or odd name '-oProxyCommand=x'; see --help"),
        (("script.py",), "unknown option script.py; what torchrun is to run comes after --; see --help"),
        (("--env", "A B"), "--env must name a variable, not 'A B'; see --help"),
        (("--timeout-s",), "--timeout-s needs a value; see --help"),
    ],
)
def test_bad_input_is_one_line(place, arguments, message):
    assert run(place, *arguments) == (2, "", f"tokenweave: {message}\n")


def test_hosts_are_needed_and_help_helps():
    bare = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (bare.returncode, bare.stderr) == (
        2,
        "tokenweave: --hosts is needed, such as --hosts gpu1,gpu2; see --help\n",
    )
    helped = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: launch/ssh.sh --hosts")
