"""Rank: what torchrun starts. Opens the model on the session's link, measures the job's points, writes the journal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from perf.overlap.baselines import open_baselines
from perf.overlap.figures import BEFORE_BASELINE
from perf.overlap.journal import Journal
from perf.overlap.measures import DECODE_CONTEXT, MEASURES
from perf.overlap.modes import MODES, Bench, link, wires
from perf.overlap.peers import open_peers
from perf.overlap.points import Point
from perf.overlap.serving import MAX_SEQS
from perf.overlap.sessions import Job, read_job
from perf.overlap.workloads import mix_of
from tokenweave.config import EngineConfig
from tokenweave.engine.rank import Rank, open_rank

BLOCK_SIZE = 16
STEP_TOKENS = 2048  # at least: measuring step times for "auto" needs room, whatever the points
TIMEOUT_S = 300.0


def config(job: Job) -> EngineConfig:
    """overlap="auto", so that step times are measured on the link as when an LLM starts."""
    setting = job.points[0].setting
    return EngineConfig(
        job.folder,
        load_format=job.load_format,
        overlap="auto",
        device=setting.device,
        link=link(setting),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=max(STEP_TOKENS, *map(step_tokens, job.points)),
        enable_prefix_caching=False,
        timeout_s=TIMEOUT_S,
        progress=False,
        **cache(job.points, setting.device),
    )


def step_tokens(point: Point) -> int:
    """Of the largest step."""
    if point.measure == "decode":
        return int(point.x)
    return point.chunk_tokens if point.measure == "mix" else int(point.x)


def sequences(point: Point) -> tuple[int, int]:
    """(how many there are at once, tokens of the longest)."""
    if point.measure == "mix":
        arrivals = mix_of(str(point.x), point.requests).arrivals()
        return min(len(arrivals), MAX_SEQS[point.setting.device]), max(one.prompt + one.output for one in arrivals)
    return (int(point.x), DECODE_CONTEXT + 1) if point.measure == "decode" else (1, int(point.x))


def cache(points: list[Point], device: str) -> dict[str, Any]:
    """Options for as many blocks as the points use, and room for a step; on a GPU fewer, where memory is short."""
    needs = [sequences(point) for point in points]
    blocks = max(STEP_TOKENS // BLOCK_SIZE, *(count * -(-tokens // BLOCK_SIZE) for count, tokens in needs))
    if device == "cpu":
        return {"num_kv_blocks": blocks}
    longest = max(tokens for _, tokens in needs)
    return {"max_model_len": longest, "max_num_seqs": -(-blocks * BLOCK_SIZE // longest)}


def bench(job: Job, rank: Rank) -> Bench:
    setting = job.points[0].setting
    rank.runner.storage.zero_()  # decode batches read what no prefill wrote
    peers, missing = open_peers(Path(job.folder), setting, job.load_format, rank.ranks, job.without)
    baselines, lacking = open_baselines(rank) if setting.device == "cuda" else ({}, {})
    missing |= {f"{BEFORE_BASELINE}{name}": why for name, why in lacking.items()}
    return Bench(rank, setting, wires(rank, setting), rank.runner.communicator, baselines, peers, missing)


def main() -> None:
    job = read_job(Path(sys.argv[1]))
    rank = open_rank(config(job))
    here = bench(job, rank)
    for point in job.points:
        result = MEASURES[point.measure](here, point)
        if rank.ranks.rank == 0:
            Journal(Path(job.journal)).append(point.key(job.code), result)
    here.put_on(MODES["off"])
    rank.ranks.gather(None)  # nobody leaves before all are done
    rank.close()


if __name__ == "__main__":
    main()
