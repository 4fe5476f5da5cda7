"""Measures: what a rank runs for a point. Collective; each returns a result of plain numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from perf.overlap.modes import Bench, mode_of
from perf.overlap.peers import tried
from perf.overlap.points import Point
from perf.overlap.serving import mix
from perf.overlap.tracing import timeline
from perf.timing import interleaved
from tokenweave.engine.batch import Batch, Span

DECODE_CONTEXT = 256  # tokens that each sequence of a decode batch has behind it


def prefill(bench: Bench, point: Point) -> dict[str, Any]:
    """Seconds by contestant of one step over a prompt of x tokens; the peers take part."""
    ids = bench.prompt(int(point.x))
    peers = {
        name: partial(partial, peer.prefill, ids) for name, peer in bench.peers.items() if peer.prefill is not None
    }
    return compare(bench, prefill_batch(bench, ids), point.rounds, peers)


def decode(bench: Bench, point: Point) -> dict[str, Any]:
    """Seconds by contestant of one step that adds a token to each of x sequences; the peers take part."""
    sequences = int(point.x)
    peers = {
        name: partial(peer.decode, sequences, DECODE_CONTEXT)
        for name, peer in bench.peers.items()
        if peer.decode is not None
    }
    return compare(bench, decode_batch(bench, sequences), point.rounds, peers)


def compare(bench: Bench, batch: Batch, rounds: int, prepare: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Every mode, communication alone, and peers, in turn. A round ends when its last rank does.

    prepare: makes what a peer is timed with.
    """
    plans = {name: bench.plan(mode, batch) for name, mode in bench.modes.items()}
    contestants: dict[str, Callable[[], Any]] = {
        name: partial(bench.step, mode, batch, plans[name]) for name, mode in bench.modes.items()
    }
    contestants |= bench.communication_alone(batch)
    peers, failed = tried(dict(prepare), bench.rank.ranks)
    contestants |= peers
    cpu_s: dict[str, list[float]] = {name: [] for name in contestants}
    timed = {name: partial(clocked, run, cpu_s[name]) for name, run in contestants.items()}
    seconds = slowest(bench.rank.ranks.gather(interleaved(timed, rounds)))
    used = slowest(bench.rank.ranks.gather({name: values[-rounds:] for name, values in cpu_s.items()}))
    missing = bench.missing | failed
    return {"seconds": seconds, "cpu_s": used, "auto_chose": mode_of(plans["auto"]), "missing": missing}


def clocked(run: Callable[[], Any], cpu_s: list[float]) -> None:
    """Run it, and note the CPU time that all threads of this rank took for it, in the kernel as well."""
    start_s = time.process_time()
    run()
    cpu_s.append(time.process_time() - start_s)


def slowest(by_rank: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """The longest of all ranks, by contestant and round."""
    return {name: [max(values) for values in zip(*(one[name] for one in by_rank))] for name in by_rank[0]}


def prefill_batch(bench: Bench, ids: list[int]) -> Batch:
    return Batch((Span(tuple(ids), 0, blocks(bench, len(ids), 0), prompt_len=len(ids), wanted=1),))


def decode_batch(bench: Bench, sequences: int) -> Batch:
    length = DECODE_CONTEXT + 1
    spans = [
        Span((1,), DECODE_CONTEXT, blocks(bench, length, i), prompt_len=DECODE_CONTEXT, wanted=1)
        for i in range(sequences)
    ]
    return Batch(tuple(spans))


def blocks(bench: Bench, tokens: int, sequence: int) -> tuple[int, ...]:
    """The cache blocks of the i-th of several sequences of one length."""
    each = -(-tokens // bench.rank.runner.config.block_size)
    return tuple(range(sequence * each, (sequence + 1) * each))


MEASURES: dict[str, Callable[[Bench, Point], dict[str, Any]]] = {
    "prefill": prefill,
    "decode": decode,
    "mix": mix,
    "timeline": lambda bench, point: timeline(bench, prefill_batch(bench, bench.prompt(int(point.x)))),
}
