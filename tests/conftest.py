"""Options, markers and fixtures of all tests. How to use them: ranks.py, checkpoints.py, reference.py."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import build_checkpoint
from tests.ranks import RankPool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked 'full' (much longer)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: part of the full product of settings, runs only with --full")
    # What was calibrated, tuned or compiled on this machine is no business of tests. Ranks inherit it.
    os.environ["TOKENWEAVE_CACHE"] = tempfile.mkdtemp(prefix="tokenweave-tests-")
    atexit.register(shutil.rmtree, os.environ["TOKENWEAVE_CACHE"], ignore_errors=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, with all they start
    torch.set_num_threads(1)  # tests are too small to gain from more, and lose much where threads wait for a busy core


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    missing = {
        "gpu": None if gpus >= 1 else "needs a CUDA GPU, this machine has none",
        "multigpu": None if gpus >= 2 else f"needs two CUDA GPUs, this machine has {gpus}",
        "full": None if config.getoption("--full") else "runs only with --full",
    }
    for item in items:
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header() -> str:
    from importlib.metadata import version

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    gpu = f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"
    return f"torch {torch.__version__}, transformers {version('transformers')}, {os.cpu_count()} cores, {gpu}"


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """ranks(world_size) -> RankPool, the same one all session long."""
    pools: dict[int, RankPool] = {}
    yield lambda world_size: pools.setdefault(world_size, RankPool(world_size))
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(name, seed=0, dtype="float32") -> folder of that tiny checkpoint, shared: never write into it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str, seed: int = 0, dtype: str = "float32") -> Path:
        return build_checkpoint(root, name, seed, dtype)

    return folder
