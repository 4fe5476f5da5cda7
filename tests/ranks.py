"""A pool of W real ranks: processes joined by a gloo group over loopback, started once per test session and reused.

Usage, in a test (`ranks` is a fixture of conftest.py):

    def total(x: int) -> int:                                  # runs on every rank; a module's function: sent by name
        tensor = torch.tensor(x * dist.get_rank())
        dist.all_reduce(tensor)
        return int(tensor)

    def test_total(ranks):
        assert ranks(2).run(total, 5) == [5, 5]                # one result per rank

    errors = ranks(2).run(bad_input, expect_errors=True)       # RankError where a rank raised, else its result
    assert all(error.type is ValueError for error in errors)
    ranks(2).output(0)                                         # what rank 0 printed and logged in that run

Each rank has the environment of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...; as there, the launcher
hosts the store), one thread, and an initialised default group. Arguments and results are pickled: no lambdas, no
nested functions.

A run fails with RankFailure, which names the rank and shows its traceback. When a rank raises unexpectedly, dies or
exceeds `timeout_s`, the pool is ended (with the stacks of those that still ran) and the next run starts a new one; a
pool whose ranks all answered with expected errors is kept if they can still talk to each other. Ranks end when the
test process does.
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 120.0
GROUP_TIMEOUT_S = 120.0
GRACE_S = 3.0  # for the other ranks, once one has raised
CHECK_TIMEOUT_S = 20.0  # for ranks that have raised as expected to show that they can still talk
REPORT_CHARACTERS = 6000


@dataclass(frozen=True)
class RankError:
    """What a rank raised. `type` is the nearest base class that can be pickled."""

    type: type[BaseException]
    message: str
    traceback: str


class RankFailure(AssertionError):
    """A run did not end as expected: ranks raised, died, or ran out of time. `errors` maps rank to RankError."""

    def __init__(self, message: str, errors: dict[int, RankError]):
        super().__init__(message)
        self.errors = errors


# -- in the test process ----------------------------------------------------------------------------------------------


class RankPool:
    """`world_size` ranks, started on first use."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._ranks: list[_Rank] = []
        self._outputs: list[str] = []

    def run(
        self, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0, expect_errors: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Calls fn(*args, **kwargs) on every rank and returns their results in rank order."""
        message = pickle.dumps((fn, args, kwargs))
        self._start()
        replies = self._call(message, timeout_s, patient=expect_errors)
        self._outputs = [rank.output() for rank in self._ranks]
        if any(isinstance(reply, RankError) for reply in replies):
            self._end_unless_healthy()
        return replies

    def output(self, rank: int) -> str:
        """stdout and stderr of that rank during the last run."""
        return self._outputs[rank]

    @property
    def pids(self) -> list[int]:
        """Of the ranks that are up: none before the first run and after a failure."""
        return [rank.process.pid for rank in self._ranks]

    def close(self) -> None:
        for rank in self._ranks:
            rank.end()
        self._ranks = []

    def _start(self) -> None:
        if self._ranks and all(rank.process.poll() is None for rank in self._ranks):
            return
        self.close()
        # The store lives here, as with torchrun: a port that is free for certain, and no rank's death takes it away.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        size, port = self.world_size, self._store.port
        self._ranks = [_Rank(_torchrun_environment(rank, size, port)) for rank in range(size)]
        self._collect(START_TIMEOUT_S, patient=False)

    def _call(self, message: bytes, timeout_s: float, patient: bool) -> list[Any]:
        for rank in self._ranks:
            rank.begin(message)
        return self._collect(timeout_s, patient)

    def _collect(self, timeout_s: float, patient: bool) -> list[Any]:
        """One reply per rank. Unless `patient`, an error fails all, and who has not replied by then gets GRACE_S."""
        deadline, reason = time.monotonic() + timeout_s, f"no reply within {timeout_s:g} s"
        replies: dict[int, Any] = {}
        while len(replies) < self.world_size:
            waiting: dict[Any, int] = {rank.connection: i for i, rank in enumerate(self._ranks) if i not in replies}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            for connection in ready:
                replies[waiting[connection]] = self._receive(waiting[connection], replies)
            if not ready:
                self._fail(replies, reason)
            if not patient and reason != "a rank raised" and _errors(replies):
                deadline, reason = min(deadline, time.monotonic() + GRACE_S), "a rank raised"
        if not patient and _errors(replies):
            self._fail(replies, reason)
        return [replies[i] for i in range(self.world_size)]

    def _receive(self, rank: int, replies: dict[int, Any]) -> Any:
        try:
            return pickle.loads(self._ranks[rank].connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            code = self._ranks[rank].process.wait(timeout=START_TIMEOUT_S)
        return self._fail(replies, f"rank {rank} died with exit code {code}")

    def _end_unless_healthy(self) -> None:
        """After expected errors a group may hold half a collective: ranks that cannot talk any more are ended."""
        outputs = self._outputs
        with contextlib.suppress(RankFailure):  # which has ended them
            self._call(pickle.dumps((_check_groups, (), {})), CHECK_TIMEOUT_S, patient=False)
        self._outputs = outputs

    def _fail(self, replies: dict[int, Any], reason: str) -> NoReturn:
        silent = [rank for rank in range(self.world_size) if rank not in replies]
        self._show_stacks(silent)
        self._outputs = [rank.output() for rank in self._ranks]
        self.close()
        raise RankFailure(self._report(_errors(replies), silent, reason), _errors(replies))

    def _show_stacks(self, ranks: list[int]) -> None:
        living = [self._ranks[rank].process.pid for rank in ranks if self._ranks[rank].process.poll() is None]
        for pid in living:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5 if living else 0.0)

    def _report(self, errors: dict[int, RankError], silent: list[int], reason: str) -> str:
        lines = [f"{self.world_size} ranks: {reason}"]
        lines += [f"rank {rank} raised {error.type.__name__}: {error.message}" for rank, error in errors.items()]
        lines += [error.traceback for error in list(errors.values())[:1]]
        ends = {rank: self._outputs[rank][-REPORT_CHARACTERS:] for rank in silent}
        lines += [f"rank {rank} had not answered; its output ends:\n{end}" for rank, end in ends.items()]
        return "\n".join(lines)


class _Rank:
    """One process, its command pipe, and the file that takes its output."""

    def __init__(self, environment: dict[str, str]):
        self.connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process lives)
        self._run_began = 0
        command = [sys.executable, "-c", f"from tests.ranks import serve; serve({theirs.fileno()})"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,  # never written to: its end tells the rank that this process is gone
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        theirs.close()

    def begin(self, message: bytes) -> None:
        self._run_began = os.fstat(self._log.fileno()).st_size
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: waiting for its reply will say so
            self.connection.send_bytes(message)

    def output(self) -> str:
        size = os.fstat(self._log.fileno()).st_size - self._run_began
        return os.pread(self._log.fileno(), size, self._run_began).decode(errors="replace")

    def end(self) -> None:
        """Kills the process and what it started: they share a session of their own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self._log.close()
        if self.process.stdin:
            self.process.stdin.close()


def _errors(replies: dict[int, Any]) -> dict[int, RankError]:
    return {rank: reply for rank, reply in sorted(replies.items()) if isinstance(reply, RankError)}


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    of_torchrun = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": 1,
    }
    of_tests = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": 1,
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **{name: str(value) for name, value in (of_torchrun | of_tests).items()}}


# -- in a rank --------------------------------------------------------------------------------------------------------


def serve(fd: int) -> None:
    """A rank's life: join the group, then answer calls until the test process goes away."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    connection = Connection(fd)
    dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        connection.send_bytes(_answer(message))


def _answer(message: bytes) -> bytes:
    try:
        fn, args, kwargs = pickle.loads(message)
        reply = pickle.dumps(fn(*args, **kwargs))
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the caller is to see all that a rank raises
        reply = pickle.dumps(RankError(_known_type(error), str(error), traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    return reply


def _known_type(error: BaseException) -> type[BaseException]:
    return next(base for base in type(error).__mro__ if "<locals>" not in base.__qualname__)


def _die_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def _check_groups() -> None:
    """Raises (or hangs, which the caller bounds) unless all ranks have made the same groups and can sum over them."""
    group = dist.new_group(timeout=timedelta(seconds=CHECK_TIMEOUT_S), backend="gloo")
    for over in (group, None):
        total = torch.ones(())
        dist.all_reduce(total, group=over)
        if int(total) != dist.get_world_size():
            raise RuntimeError(f"a sum of ones over {dist.get_world_size()} ranks came out as {int(total)}")
    dist.destroy_process_group(group)
