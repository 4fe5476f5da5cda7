"""What fails is given up first, then closed: nobody waits for sums whose rank is gone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.comm.twins import TwinKernels, twins_in_the_runtime
from tests.test_llm import HELLO, PROMPTS
from tests.test_workers import LONG, ROOT, check_lost, open_two
from tokenweave import LLM
from tokenweave.comm.group import PeerError
from tokenweave.engine import engine, rank, runner
from tokenweave.engine.rank import Rank
from tokenweave.engine.runner import Runner
from tokenweave.engine.stepper import Stepper
from tokenweave.engine.workers import READY_FD, Workers
from tokenweave.waiting import wait_until
from tokenweave.weave.lanes import ThreadPending

TIMEOUT_S = 600.0  # of the kernels; the test may not take so long
LAST_LAUNCH = 40  # of the worker: somewhere in a step
TOLD = r"rank 0, half \d, block \d: told by its host to give up on rank 1 \(expected .*\): an earlier call failed"


def note_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What is called from here on, in order: the method, and what it was given beside itself."""
    noted: list[tuple[str, Any]] = []

    def noting(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def call(self: Any, *given: Any, **named: Any) -> Any:
            noted.append((f"{owner.__name__}.{name}", next(iter((*given, *named.values())), None)))
            return method(self, *given, **named)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Rank, "abort"), (Rank, "close"), (Workers, "dismiss"), (Workers, "stop")):
        noting(owner, name)
    return noted


def test_what_breaks_off_is_given_up_before_anybody_waits(checkpoint, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    llm, noted = open_two(checkpoint("llama")), note_calls(monkeypatch)
    monkeypatch.setattr(engine, "run_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(HELLO)
    first, second, *_, close, _, _ = noted
    assert (first, second, close) == (
        ("Rank.abort", "an earlier call failed"),
        ("Workers.stop", True),
        ("Rank.close", True),
    )


def test_ranks_that_are_done_leave_together(checkpoint, monkeypatch):
    llm, noted = open_two(checkpoint("llama")), note_calls(monkeypatch)
    llm.generate(HELLO)
    llm.close()
    assert noted[:3] == [("Workers.dismiss", None), ("Rank.close", False), ("Workers.stop", None)]


def test_what_cannot_be_opened_is_given_up(checkpoint, monkeypatch):
    def full(_: Any) -> None:
        raise ValueError("no memory is left")

    noted: list[Any] = []
    close = Runner.close
    monkeypatch.setattr(rank, "allocate_cache", full)
    monkeypatch.setattr(Runner, "abort", lambda self, why: noted.append(why))
    monkeypatch.setattr(Runner, "close", lambda self, failed=False: noted.append(failed) or close(self, failed))
    with pytest.raises(ValueError, match="no memory is left"):
        LLM(checkpoint("llama"), device="cpu", progress=False)
    assert noted == ["it could not be opened", True]


class Noting:
    """Anything at all, of which the calls are noted."""

    def __init__(self, name: str, noted: list[str], **attributes: Any):
        self.name, self.noted = name, noted
        vars(self).update(attributes)

    def __getattr__(self, method: str) -> Any:
        return lambda *_, **__: self.noted.append(f"{self.name}.{method}")


@pytest.mark.parametrize("failed", [True, False])
def test_in_which_order_a_runner_lets_go(failed):
    """NCCL waits for graphs, streams for NCCL."""
    noted: list[str] = []
    parts = {name: Noting(name, noted) for name in ("graphs", "ranks", "watcher", "lane", "transport")}
    Runner.close(SimpleNamespace(**parts), failed)
    given_up = ["ranks.abort"] if failed else []
    assert noted == ["graphs.close", *given_up, "watcher.close", "lane.close", "transport.close"]


@pytest.mark.parametrize(
    ("failed", "order"),
    [
        (True, ["rank.abort", "workers.stop", "rank.close", "stopped"]),
        (False, ["ranks.send", "workers.dismiss", "rank.close", "stopped"]),
    ],
)
def test_in_which_order_a_stepper_lets_go(failed, order):
    noted: list[str] = []
    own = {"rank": Noting("rank", noted, ranks=Noting("ranks", noted)), "_workers": Noting("workers", noted)}
    Stepper.close(SimpleNamespace(leads=True, _stop=lambda: noted.append("stopped"), **own), failed)
    assert noted == order


@pytest.mark.parametrize(("device", "watch", "watched"), [("cuda", print, True), ("cuda", None, False), ("cpu", print, False)])  # fmt: skip  # noqa: E501
def test_ranks_that_an_llm_started_are_watched_on_cuda(monkeypatch, device, watch, watched):
    communicator, made = Noting("communicator", []), []
    monkeypatch.setattr(runner, "open_communicator", lambda *_: communicator)
    monkeypatch.setattr(runner, "Watcher", lambda *given: made.append(given))
    of = Noting("runner", [], ranks=SimpleNamespace(watch=watch, device=torch.device(device)))
    of.spec = SimpleNamespace(hidden_size=8)
    Runner.connect(of)
    assert [given[0] for given in made] == [watch] * watched
    for _, abort in made:
        abort("a rank has ended")
    assert communicator.noted == ["communicator.abort"] * watched


# -- a worker is killed while rank 0's kernel waits for it: over the kernel's twins, in a plain process ----------------


def use_twins_in_workers(folder: Path) -> None:
    """By a module that Python imports when it starts."""
    (folder / "sitecustomize.py").write_text(
        f"import os\nif {READY_FD!r} in os.environ:\n    from tests.test_abort import end_in_a_launch\n"
        f"    end_in_a_launch({str(folder)!r})\n"
    )
    sys.path.insert(0, str(folder))


def end_in_a_launch(folder: str) -> None:
    """In the worker."""
    twins = twins_in_the_runtime("peer", Path(folder), one_shot_rows=0)
    twins.__enter__()
    launch = TwinKernels.launch

    def counted(kernels: TwinKernels, *arguments: Any) -> None:
        if len(kernels.launches) == LAST_LAUNCH:
            os.kill(os.getpid(), signal.SIGKILL)
        launch(kernels, *arguments)

    counted.keeps = twins  # type: ignore[attr-defined]  # or it would end here
    TwinKernels.launch = counted  # type: ignore[method-assign]


def lose_the_worker(model: str, folder: str) -> None:
    """In the process of rank 0. It waits as on CUDA: it looks at its ranks meanwhile, and not for what nobody wants."""
    use_twins_in_workers(Path(folder))
    with twins_in_the_runtime("peer", Path(folder), one_shot_rows=0) as opened:
        llm = open_two(Path(model), overlap="weave", timeout_s=TIMEOUT_S)
    check = llm._runner.check

    def look_and_wait(pending: ThreadPending) -> None:
        wait_until(pending._done.is_set, TIMEOUT_S, check, "a step")

    on_cuda = {"_await": look_and_wait, "drain": lambda pending: None}
    with mock.patch.multiple(ThreadPending, **on_cuda):
        check_lost(llm, lambda: llm.generate([PROMPTS[1]] * 5, LONG))
    assert all("lane" not in thread.name for thread in threading.enumerate())
    with pytest.raises(PeerError) as caught:
        opened[0].check()
    assert re.fullmatch(TOLD, str(caught.value)), caught.value


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which compiles the kernel's twin")
def test_a_killed_rank_does_not_keep_the_others_waiting(checkpoint, tmp_path):
    code = "import sys; from tests.test_abort import lose_the_worker; lose_the_worker(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint("llama"), tmp_path],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
