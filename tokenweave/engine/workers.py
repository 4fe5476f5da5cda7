"""Workers: the other ranks of an LLM that was not started by torchrun, as processes of this host."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import BinaryIO

import torch
import torch.distributed as dist

from tokenweave.comm.group import Rendezvous, environment_world_size, has_workers
from tokenweave.config import EngineConfig

START_TIMEOUT_S = 180.0  # to import torch, on a cold and busy machine
STOP_TIMEOUT_S = 5.0
END_TIMEOUT_S = 2.0  # from a rank's connections to its process: the former end first
READY_FD = "TOKENWEAVE_READY_FD"


class Workers:
    """Ranks 1..world_size-1. A worker lives on its standard input: a byte wakes it, the end of it ends it.

    Workers are in sessions of their own, so that Ctrl-C reaches the caller alone, which then ends them.
    """

    def __init__(self, config: EngineConfig, world_size: int):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # 0: any port that is free
        self.meeting = Rendezvous(self.store.port, 0, world_size)
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            with contextlib.ExitStack() as open_files:
                ready = [open_files.enter_context(self._start(config, rank)) for rank in range(1, world_size)]
                self._await(ready)
        except BaseException:
            self.stop(force=True)
            raise

    def wake(self) -> None:
        """Have every worker follow rank 0 until it is told that the call is done. BrokenPipeError: one has ended."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()

    def check(self) -> None:
        """Raises ConnectionError if one has ended. On CUDA nothing else says so: its sums, unsummed, just never end."""
        if any(process.poll() is not None for process in self.processes):
            raise ConnectionError(self.ended())

    def ended(self) -> str:
        """Which ranks have ended, in words. Called where one seems to be gone: waits a moment until one is."""
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while all(process.poll() is None for process in self.processes) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        codes = {rank: process.poll() for rank, process in enumerate(self.processes, start=1)}
        gone = [f"rank {rank} {how_ended(code)}" for rank, code in codes.items() if code is not None]
        return f"{', '.join(gone) or 'a rank does not answer'}; its output, if any, is above"

    def dismiss(self) -> None:
        """Tell every worker that no call will come, by the end of its input. It then closes, which NCCL waits for where
        this rank does."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def stop(self, force: bool = False) -> None:
        """End every worker: one that waits for a call is dismissed, one in mid-step (force) gets a signal."""
        self.dismiss()
        for process in self.processes if force else ():
            process.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
        self.processes = []

    def _start(self, config: EngineConfig, rank: int) -> BinaryIO:
        """Start one worker; returns the pipe on which it says that it is ready to meet."""
        read_fd, write_fd = os.pipe()
        local = {
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.meeting.world_size),
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),  # it imports what the caller does
            READY_FD: str(write_fd),
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tokenweave.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=2,  # what a worker prints is not the caller's output
            env=os.environ | local,
            pass_fds=[write_fd],
            start_new_session=True,
        )
        os.close(write_fd)
        self.processes.append(process)
        assert process.stdin is not None
        config = replace(config, policy=None)  # rank 0 alone schedules, and not every function can be sent
        with contextlib.suppress(BrokenPipeError):  # it has ended at once, which `_await` sees
            pickle.dump((config, replace(self.meeting, rank=rank), torch.get_num_threads()), process.stdin)
            process.stdin.flush()
        return os.fdopen(read_fd, "rb", buffering=0)

    def _await(self, ready: list[BinaryIO]) -> None:
        """Wait until every worker is ready; raises when one ends first or none comes within START_TIMEOUT_S."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        for rank, pipe in enumerate(ready, start=1):
            readable, _, _ = select.select([pipe], [], [], max(0.0, deadline_s - time.monotonic()))
            if not (readable and pipe.read(1)):
                why = "ended at once" if readable else f"was not ready after {START_TIMEOUT_S:g} s"
                raise RuntimeError(f"the process of rank {rank} {why}; its output is above")


def how_ended(code: int) -> str:
    """code: as subprocess gives it, below zero for a signal."""
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def start_workers(config: EngineConfig) -> Workers | None:
    """The other ranks, where they are this process's to start; and this host's cores shared out among its ranks.

    Raises ValueError where tensor_parallel_size contradicts what is already running.
    """
    if has_workers():
        raise ValueError(
            "an LLM of this process has started ranks of its own and is still open, which leaves no room for another; "
            "close it first"
        )
    running, asked = environment_world_size(), config.tensor_parallel_size
    if asked is None or asked == running:
        share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", running)))
        return None
    if running > 1 or dist.is_initialized():
        raise ValueError(
            f"tensor_parallel_size={asked}, but this process is one of {running} already (by torchrun or "
            f"init_process_group); expected {running} or None: leave it out, or start {asked} processes"
        )
    share_cores(asked)
    return Workers(config, asked)


def share_cores(ranks: int) -> None:
    """Threads for torch's operators: this rank's share of the host's cores, unless OMP_NUM_THREADS says otherwise."""
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // ranks))
