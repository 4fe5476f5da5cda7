"""Rank: what torchrun starts. Opens the model on the session's link, measures the job's points, writes the journal."""

from __future__ import annotations

import sys
from pathlib import Path

from perf.overlap.journal import Journal
from perf.overlap.measures import MEASURES
from perf.overlap.modes import Bench, link, wires
from perf.overlap.peers import open_peers
from perf.overlap.points import Point
from perf.overlap.sessions import Job, read_job
from tokenweave.config import EngineConfig
from tokenweave.engine.rank import Rank, open_rank

BLOCK_SIZE = 16
STEP_TOKENS = 2048  # at least: measuring step times for "auto" needs room, whatever the points
DECODE_BLOCKS = 17  # of each sequence in a decode batch: 257 tokens
SERVING_BLOCKS = 1024
TIMEOUT_S = 300.0


def config(job: Job) -> EngineConfig:
    """overlap="auto", so that step times are measured on the link as when an LLM starts."""
    setting = job.points[0].setting
    return EngineConfig(
        job.folder,
        overlap="auto",
        device=setting.device,
        link=link(setting),
        block_size=BLOCK_SIZE,
        num_kv_blocks=max([STEP_TOKENS // BLOCK_SIZE, *map(blocks, job.points)]),
        max_num_batched_tokens=max(
            [STEP_TOKENS, *(int(point.x) for point in job.points if point.measure == "prefill")]
        ),
        enable_prefix_caching=False,
        timeout_s=TIMEOUT_S,
        progress=False,
    )


def blocks(point: Point) -> int:
    if point.measure == "mix":
        return SERVING_BLOCKS
    return int(point.x) * DECODE_BLOCKS if point.measure == "decode" else -(-int(point.x) // BLOCK_SIZE)


def bench(job: Job, rank: Rank) -> Bench:
    setting = job.points[0].setting
    rank.runner.storage.zero_()  # decode batches read what no prefill wrote
    wanted = any(point.measure == "prefill" for point in job.points)
    peers, missing = open_peers(Path(job.folder), setting, rank.ranks) if wanted else ({}, {})
    return Bench(rank, setting, wires(rank, setting), peers, missing)


def main() -> None:
    job = read_job(Path(sys.argv[1]))
    rank = open_rank(config(job))
    here = bench(job, rank)
    for point in job.points:
        result = MEASURES[point.measure](here, point)
        if rank.ranks.rank == 0:
            Journal(Path(job.journal)).append(point.key(job.code), result)
    here.put_on("link")
    rank.ranks.gather(None)  # nobody leaves before all are done
    rank.close()


if __name__ == "__main__":
    main()
