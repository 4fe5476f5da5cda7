"""launch/slurm.sh with a Slurm of stubs; and, by its srun, two nodes that are two torchruns of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sh"
TIMEOUT_S = 200
PRINT = "#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n"
# Both nodes are here: runs the command twice, as two tasks would, each line after its task's number.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    case $1 in --nodes | --ntasks | --ntasks-per-node) shift ;; esac
    shift
done
set -o pipefail
"$@" 2>&1 | sed "s/^/0: /" & first=$!
"$@" 2>&1 | sed "s/^/1: /" & second=$!
wait $first && wait $second
"""
SCONTROL = "#!/usr/bin/env bash\n[[ \"$*\" == 'show hostnames node[3-4]' ]] && printf '%s\\n' 127.0.0.1 node4\n"
JOB = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[3-4]"}


def run(place, *arguments, stubs, env=None):
    for name, text in stubs.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TOKENWEAVE_ROOT"))}
    environment = clean | {"PATH": f"{place}:{os.environ['PATH']}"} | (env or {})
    done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "gpus",
    [
        ("--gpus-per-node", "8"),
        ("--gpus-per-node", "h100:8"),
        ("--gres", "gpu:8"),
        ("--gres", "gpu:h100_80gb-sxm:8"),
        ("--gres", "nvme:1,gpu:h100:8,x:2"),
    ],
)
def test_it_submits_itself_in_slurms_words(tmp_path, gpus):
    code, out, err = run(
        tmp_path, "--nodes", "2", *gpus, "--sbatch", "--time=30", "--", "a.py", "b c", stubs={"sbatch": PRINT}
    )
    assert code == 0, err
    words = out.splitlines()
    assert words[:6] == ["--nodes", "2", "--ntasks-per-node", "1", *gpus]
    assert words[6:10] == ["--time=30", "--export", f"ALL,TOKENWEAVE_ROOT={ROOT}", str(SCRIPT)]
    assert words[10:14] == ["--nodes", "2", "--nproc", "8"]
    assert words[-3:] == ["--", "a.py", "b c"]


@pytest.mark.parametrize(
    ("gpus", "nproc"),
    [({"SLURM_GPUS_PER_NODE": "h100:8"}, "8"), ({"SLURM_GPUS_PER_NODE": "4"}, "4"), ({"SLURM_GPUS_ON_NODE": "2"}, "2")],
)
def test_in_a_job_torchrun_starts_on_each_node(tmp_path, gpus, nproc):
    stubs = {"srun": PRINT, "scontrol": SCONTROL}
    code, out, err = run(tmp_path, "--", "-m", "x", "y z", stubs=stubs, env=JOB | gpus)
    assert code == 0, err
    words = out.splitlines()
    assert " ".join(words[:8]) == "--nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 --label"
    assert words[9:14] == ["launch/ranks.py", "--nnodes", "2", "--nproc-per-node", nproc]
    assert words[words.index("--rdzv-endpoint") + 1] == "127.0.0.1:23456"  # 20000 + 123456 % 10000
    assert words[words.index("--rdzv-id") + 1] == "tokenweave-123456"
    assert words[-4:] == ["-m", "--", "x", "y z"]  # after --, torchrun takes no option of x for its own


def test_a_dry_run_prints_the_command(tmp_path):
    code, out, _ = run(tmp_path, "--nodes=3", "--gpus-per-node", "8", "--dry-run", "--", "a.py", stubs={})
    assert code == 0
    assert out.startswith("sbatch --nodes 3 --ntasks-per-node 1 --gpus-per-node 8 --export ALL,TOKENWEAVE_ROOT=")
    assert "--dry-run" not in out


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ((), {}, "--nodes is needed, such as --nodes 2; see --help"),
        (("--nodes", "2"), {}, "--gpus-per-node is needed, such as --gpus-per-node 8; see --help"),
        (("--nodes", "two"), {}, "--nodes must be a whole number such as 8, not 'two'; see --help"),
        (("a.py",), {}, "unknown option a.py; what torchrun is to run comes after --; see --help"),
        (
            ("--nodes", "2", "--gpus-per-node", "h100"),
            {},
            "--gpus-per-node must be a number such as 8, or h100:8, not 'h100'; see --help",
        ),
        (
            ("--nodes", "2", "--gpus-per-node=a100:2,h100:8"),
            {},
            "--gpus-per-node must be a number such as 8, or h100:8, not 'a100:2,h100:8'; see --help",
        ),
        (
            ("--nodes", "2", "--gres", "gpu"),
            {},
            "--gres must ask for GPUs, such as gpu:8 or gpu:h100:8, not 'gpu'; see --help",
        ),
        (
            ("--gres", "gpu:8", "--gpus-per-node", "8"),
            {},
            "--gpus-per-node and --gres ask for the same, the GPUs of a node; give one of them",
        ),
        ((), JOB, "the job names no GPUs; give --gpus-per-node, or --nproc for ranks without"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, env, message):
    assert run(tmp_path, *arguments, stubs={"scontrol": SCONTROL}, env=env) == (2, "", f"tokenweave: {message}\n")


def test_two_nodes_generate_together(tmp_path):
    """Real: two torchruns that meet by c10d, one rank each, over gloo; the group spans what torchrun takes for two
    machines."""
    command = "-m tokenweave.cli generate -n 1 --device cpu --overlap weave --json 12+34= 999+1="
    stubs = {"srun": SRUN, "scontrol": SCONTROL}
    env = JOB | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TOKENWEAVE_CACHE": str(tmp_path)}
    options = ("--nproc", "1", "--port", str(free_port()), "--python", sys.executable)
    code, out, err = run(tmp_path, *options, "--", *command.split(), stubs=stubs, env=env)
    assert code == 0, out + err
    (answer,) = [json.loads(line.partition(": ")[2]) for line in out.splitlines() if "completions" in line]
    assert (answer["world_size"], answer["comm"]["implementation"]) == (2, "sharded")
    assert [output["completions"][0]["text"] for output in answer["outputs"]] == ["46", "1000"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
