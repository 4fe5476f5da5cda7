"""Opening one rank: the same steps on every rank, in the same order, with every failure shared."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenweave.comm.group import Ranks, Rendezvous, join
from tokenweave.config import EngineConfig
from tokenweave.cost.measure import measure_carve_out, measure_step_times
from tokenweave.cost.planner import Planner
from tokenweave.engine.allocation import allocate_cache
from tokenweave.engine.at_hand import graph_tokens
from tokenweave.engine.memory import check_claim, explained, open_meter
from tokenweave.engine.planning import open_planner
from tokenweave.engine.runner import Runner
from tokenweave.models.hub import resolve
from tokenweave.models.registry import read_config
from tokenweave.weave.lanes import Observer
from tokenweave.weave.plan import StepTimes


@dataclass(frozen=True)
class Rank:
    """An open rank."""

    ranks: Ranks
    runner: Runner
    folder: Path
    hf_config: Any
    times: StepTimes | None  # measured for overlap="auto"
    planner: Planner

    def abort(self, why: str) -> None:
        """As Communicator.abort."""
        self.runner.abort(why)

    def close(self, failed: bool = False) -> None:
        """failed: as Runner.close."""
        self.runner.close(failed)
        self.ranks.leave()


def open_rank(
    config: EngineConfig,
    meeting: Rendezvous | None = None,
    observers: tuple[Observer, ...] = (),
    watch: Callable[[], None] | None = None,
) -> Rank:
    """Join the others, load this rank's share of the model, and measure where the plan asks for it. Collective.

    watch: as Ranks.watch.
    Raises the same kind of error on every rank when any of them fails.
    """
    device = pick_device(config.device, *local_place(meeting))
    ranks = join(device, config.timeout_s, meeting)
    ranks.watch = watch
    try:
        return load_rank(config, ranks, observers)
    except BaseException:
        ranks.leave()
        raise


def load_rank(config: EngineConfig, ranks: Ranks, observers: tuple[Observer, ...]) -> Rank:
    # Rank 0 downloads first; ranks of its host then find the model in the cache.
    ranks.first_rank_only("finding the model", lambda: prepare(config))
    meter = open_meter(ranks.device)
    with ranks.together("looking for free GPU memory"):
        if meter is not None and config.num_kv_blocks is None:
            check_claim(meter.restart(), config.gpu_memory_utilization)
    full = explained("the weights", "raise tensor_parallel_size, or free memory", meter, ValueError)
    with ranks.together("loading the model"), full:
        folder = find_model(config)
        hf_config = read_config(folder)
        runner = Runner(config, ranks, folder, hf_config, observers)
    try:
        runner.connect()
        runner.graph_tokens = graph_tokens(runner)
        allocate_cache(runner)
        # Not `together`, which would wait for ranks in mid-step: these see the connections of one that failed end.
        carve_out = config.overlap in ("auto", "weave") and measure_carve_out(runner)
        measured = config.overlap == "auto" and ranks.world_size > 1
        times = measure_step_times(runner, carve_out) if measured else None
        with ranks.together("reading what is known of this machine"):
            planner = open_planner(runner, times, carve_out)
        if runner.recorder is not None:
            runner.recorder.clear()  # a timeline is of what the user asked for
    except BaseException:
        runner.abort("it could not be opened")
        runner.close(failed=True)
        raise
    return Rank(ranks, runner, folder, hf_config, times, planner)


def prepare(config: EngineConfig) -> None:
    """What one rank does for all, before anything that takes long."""
    if config.trace is not None and not Path(config.trace).absolute().parent.is_dir():
        raise ValueError(f"trace={config.trace!r} cannot be written: its folder does not exist; make it first")
    find_model(config)


def find_model(config: EngineConfig) -> Path:
    return resolve(config.model, weights=config.load_format != "dummy")


def local_place(meeting: Rendezvous | None) -> tuple[int, int]:
    """(this rank's number on its host, how many ranks the host has)."""
    if meeting is not None:
        return meeting.rank, meeting.world_size
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def pick_device(asked: str, local_rank: int, local_ranks: int) -> torch.device:
    """The device of this rank. "auto": CUDA where this host has a GPU for each of its ranks, else the CPU.

    Raises ValueError for CUDA where there is none.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and gpus == 0:
        raise ValueError(
            "device='cuda', but torch sees no CUDA device; install a CUDA build of torch, or use device='cpu'"
        )
    if asked == "cpu" or gpus == 0:
        return torch.device("cpu")
    if asked == "auto" and gpus < local_ranks:
        if local_rank == 0:
            warnings.warn(f"{local_ranks} ranks share {gpus} GPU: running on the CPU", stacklevel=2)
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device
