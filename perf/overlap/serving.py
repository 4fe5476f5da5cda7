"""Serving: a request mix through the engine, each request when it arrives, and what its users would have seen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from perf.overlap.figures import fastest_off, percentile
from perf.overlap.modes import MODES, Bench, Mode
from perf.overlap.peers import tried
from perf.overlap.points import Point
from perf.overlap.workloads import Arrival, mix_of
from perf.shapes import prompt
from perf.timing import interleaved
from tokenweave.engine.engine import Engine, follow
from tokenweave.engine.messages import Done
from tokenweave.engine.request import Completion, Prompt, RequestState
from tokenweave.engine.vocabulary import Vocabulary
from tokenweave.sampling_params import SamplingParams

PERCENTS = (50, 90, 99)
MAX_SEQS = {"cpu": 64, "cuda": 256}  # that run at once, by device
TRIALS = 3  # steps of each baseline, to find the fastest

Figures = dict[str, float]


def mix(bench: Bench, point: Point) -> dict[str, Any]:
    """By mode and figure, the value of each round: the same arrivals each time, modes and peers in turn."""
    drawn = mix_of(str(point.x), point.requests)
    arrivals = drawn.arrivals()
    off, contestants = served_modes(bench, point.chunk_tokens)
    runs: dict[str, Callable[[], Figures]] = {
        name: partial(serve, bench, mode, arrivals, point.chunk_tokens) for name, mode in contestants.items()
    }
    peers = {
        name: partial(partial, peer.serve, arrivals) for name, peer in bench.peers.items() if peer.serve is not None
    }
    if drawn.rate_per_s == 0:
        usable, failed = tried(dict(peers), bench.rank.ranks)
        runs |= {name: partial(serve_peer, run, arrivals) for name, run in usable.items()}
    else:
        failed = dict.fromkeys(peers, "it takes up no request while others run")
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for _ in range(point.rounds):
        for name, run in runs.items():
            for figure, value in bench.rank.ranks.gather(run())[0].items():
                figures[name].setdefault(figure, []).append(value)
    return {"figures": figures, "words": drawn.words, "missing": bench.missing | failed, "off": off}


def served_modes(bench: Bench, rows: int) -> tuple[str, dict[str, Mode]]:
    """(which `off` is the fastest for a prompt of so many rows, the modes with that one). Collective."""
    offs = {"off": MODES["off"]} | bench.offs
    if len(offs) == 1:
        return "off", MODES
    batch = bench.rank.runner.blank_batch(rows)
    plan = bench.plan(MODES["off"], batch)
    seconds = interleaved({name: partial(bench.step, mode, batch, plan) for name, mode in offs.items()}, TRIALS)
    best = fastest_off(bench.rank.ranks.gather(seconds)[0])
    return best, MODES | {"off": offs[best]}


def serve_peer(run: Callable[[], Any], arrivals: list[Arrival]) -> Figures:
    """A peer's throughput; its requests are not followed one by one."""
    start_s = time.monotonic()
    run()
    return throughput(arrivals, time.monotonic() - start_s)


def serve(bench: Bench, mode: Mode, arrivals: list[Arrival], chunk_tokens: int) -> Figures:
    """One run of all requests. Rank 0 returns its figures, the others follow it."""
    rank = bench.rank
    bench.put_on(mode)
    if rank.ranks.rank > 0:
        for message in follow(rank.runner, rank.ranks):
            if isinstance(message, Done):
                return {}
    seqs = MAX_SEQS[bench.setting.device]
    config = replace(rank.runner.config, overlap=mode.overlap, max_num_batched_tokens=chunk_tokens, max_num_seqs=seqs)
    engine = OpenLoop(config, rank.ranks, rank.runner, Vocabulary(None, ()), bench.planner(mode))
    start_s = time.monotonic()
    requests = engine.serve(arrivals, start_s, bench.vocab_size)
    rank.ranks.send(Done([]))
    return figures_of(requests, arrivals, time.monotonic() - start_s)


class OpenLoop(Engine):
    """An engine whose requests come at their own times, whether it keeps up or not."""

    def serve(self, arrivals: list[Arrival], start_s: float, vocab_size: int) -> list[RequestState]:
        """Arrivals must ascend in time. Returns every request, finished."""
        self.coming = deque(enumerate(arrivals))
        self.start_s, self.vocab_size = start_s, vocab_size
        self.arrived: list[RequestState] = []
        running: dict[int, tuple[RequestState, Completion]] = {}
        while self.coming or self.scheduler.busy:
            self._admit(running)
            if self.scheduler.busy:
                self._run(running)
            else:
                time.sleep(max(0.0, self.start_s + self.coming[0][1].at_s - time.monotonic()))
        return self.arrived

    def _run(self, running: dict[int, tuple[RequestState, Completion]]) -> None:
        """Step until nothing is left to compute; who arrives meanwhile is taken up before the next step."""
        for _ in (self._overlapped if self.overlapped else self._plain)(running):
            pass

    def _launch(self, running: dict[int, tuple[RequestState, Completion]]) -> Any:
        self._admit(running)
        return super()._launch(running)

    def _admit(self, running: dict[int, tuple[RequestState, Completion]]) -> None:
        """Start every request whose time has come."""
        while self.coming and self.start_s + self.coming[0][1].at_s <= time.monotonic():
            request = self._arrive(*self.coming.popleft())
            running |= {id(one.sequence): (request, one) for one in request.completions}
            self.arrived.append(request)

    def _arrive(self, number: int, arrival: Arrival) -> RequestState:
        params = SamplingParams(temperature=0.0, max_tokens=arrival.output, ignore_eos=True)
        ids = tuple(prompt(arrival.prompt, seed=number, vocab_size=self.vocab_size))
        request = self._start(Prompt(None, ids, params, arrival.output))
        request.arrival_s = self.start_s + arrival.at_s  # it waited for the step in progress
        return request


def throughput(arrivals: list[Arrival], elapsed_s: float) -> Figures:
    """Tokens/s: what was generated, and that with the prompts, as TokenWeave counts."""
    output, prompts = sum(one.output for one in arrivals), sum(one.prompt for one in arrivals)
    return {"output tokens/s": output / elapsed_s, "total tokens/s": (output + prompts) / elapsed_s}


def figures_of(requests: list[RequestState], arrivals: list[Arrival], elapsed_s: float) -> Figures:
    """Throughput in tokens/s, and TTFT, TPOT and E2E in seconds by percentile."""
    users = [times(request) for request in requests]
    figures = throughput(arrivals, elapsed_s)
    for name in ("TTFT", "TPOT", "E2E"):
        values = [user[name] for user in users if name in user]
        figures |= {f"{name} p{percent}": percentile(values, percent) for percent in PERCENTS if values}
    return figures


def times(request: RequestState) -> dict[str, float]:
    """Of one finished request; no TPOT for a single token."""
    assert request.first_token_s is not None
    assert request.finished_s is not None
    tokens = sum(len(one.sequence.output) for one in request.completions)
    own = {
        "TTFT": request.first_token_s - request.arrival_s,
        "E2E": request.finished_s - request.arrival_s,
    }
    if tokens > 1:
        own["TPOT"] = (request.finished_s - request.first_token_s) / (tokens - 1)
    return own
