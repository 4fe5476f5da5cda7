"""Workers: the other ranks of an LLM that was not started by torchrun, as processes of this host."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import subprocess
import sys
import time
from dataclasses import replace

import torch

from tokenweave.comm.group import Rendezvous, environment_world_size
from tokenweave.config import EngineConfig

START_TIMEOUT_S = 180.0  # to import torch, on a cold and busy machine
STOP_TIMEOUT_S = 5.0
READY_FD = "TOKENWEAVE_READY_FD"


class Workers:
    """Ranks 1..world_size-1. A worker lives on its standard input: a byte wakes it, the end of it ends it.

    Workers are in sessions of their own, so that Ctrl-C reaches the caller alone, which then ends them.
    """

    def __init__(self, config: EngineConfig, world_size: int):
        self.meeting = Rendezvous(free_port(), 0, world_size)
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            ready = [self._start(config, rank) for rank in range(1, world_size)]
            self._await(ready)
        except BaseException:
            self.stop(force=True)
            raise

    def wake(self) -> None:
        """Have every worker follow rank 0 until it is told that the call is done."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()

    def stop(self, force: bool = False) -> None:
        """End every worker: one that waits for a call by the end of its input, one in mid-step (force) by a signal."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            if force:
                process.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
        self.processes = []

    def _start(self, config: EngineConfig, rank: int) -> int:
        """Start one worker; returns the descriptor on which it says that it is ready to meet."""
        read_fd, write_fd = os.pipe()
        world_size = self.meeting.world_size
        local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size), READY_FD: str(write_fd)}
        process = subprocess.Popen(
            [sys.executable, "-m", "tokenweave.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=2,  # what a worker prints is not the caller's output
            env=os.environ | local,
            pass_fds=[write_fd],
            start_new_session=True,
        )
        os.close(write_fd)
        self.processes.append(process)
        assert process.stdin is not None
        meeting = replace(self.meeting, rank=rank)
        pickle.dump((config, meeting, torch.get_num_threads(), sys.path), process.stdin)
        process.stdin.flush()
        return read_fd

    def _await(self, ready: list[int]) -> None:
        """Wait until every worker is ready; raises when one ends first or none comes within START_TIMEOUT_S."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        for rank, fd in enumerate(ready, start=1):
            readable, _, _ = select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))
            said = os.read(fd, 1) if readable else b""
            os.close(fd)
            if not said:
                why = "ended at once" if readable else f"was not ready after {START_TIMEOUT_S:g} s"
                raise RuntimeError(f"the process of rank {rank} {why}; its output is above")


def start_workers(config: EngineConfig) -> Workers | None:
    """The other ranks, where they are this process's to start; and this host's cores shared out among its ranks.

    Raises ValueError where tensor_parallel_size contradicts what is already running.
    """
    running, asked = environment_world_size(), config.tensor_parallel_size
    if asked is None or asked == running:
        share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", running)))
        return None
    if running > 1:
        raise ValueError(
            f"tensor_parallel_size={asked}, but this process is one of {running} ranks already (torchrun, or another "
            "open tensor-parallel LLM); leave it out, or close the other LLM first"
        )
    share_cores(asked)
    return Workers(config, asked)


def share_cores(ranks: int) -> None:
    """Threads for torch's operators: this rank's share of the host's cores, unless OMP_NUM_THREADS says otherwise."""
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
