"""Serving: a request mix through the engine, each request when it arrives, and what its users would have seen."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from perf.overlap.figures import percentile
from perf.overlap.modes import MODES, Bench, Mode
from perf.overlap.points import Point
from perf.overlap.workloads import MIXES, Arrival
from perf.shapes import prompt
from tokenweave.engine.engine import Engine, follow
from tokenweave.engine.messages import Done
from tokenweave.engine.request import Completion, Prompt, RequestState
from tokenweave.engine.vocabulary import Vocabulary
from tokenweave.sampling_params import SamplingParams

PERCENTS = (50, 90, 99)


def mix(bench: Bench, point: Point) -> dict[str, Any]:
    """By mode and figure, the value of each round: the same arrivals in every mode and round, modes in turn."""
    arrivals = MIXES[str(point.x)].arrivals()
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in MODES}
    for _ in range(point.rounds):
        for name, mode in MODES.items():
            for figure, value in bench.rank.ranks.gather(serve(bench, mode, arrivals))[0].items():
                figures[name].setdefault(figure, []).append(value)
    return {"figures": figures, "words": MIXES[str(point.x)].words}


def serve(bench: Bench, mode: Mode, arrivals: list[Arrival]) -> dict[str, float]:
    """One run of all requests. Rank 0 returns its figures, the others follow it."""
    rank = bench.rank
    bench.put_on(mode.wire)
    if rank.ranks.rank > 0:
        for message in follow(rank.runner, rank.ranks):
            if isinstance(message, Done):
                return {}
    config = replace(rank.runner.config, overlap=mode.overlap)
    engine = OpenLoop(config, rank.ranks, rank.runner, Vocabulary(None, ()), bench.planner(mode))
    start_s = time.monotonic()
    requests = engine.serve(arrivals, start_s)
    rank.ranks.send(Done([]))
    return figures_of(requests, time.monotonic() - start_s)


class OpenLoop(Engine):
    """An engine whose requests come at their own times, whether it keeps up or not."""

    def serve(self, arrivals: list[Arrival], start_s: float) -> list[RequestState]:
        """Arrivals must ascend in time. Returns every request, finished."""
        requests: list[RequestState] = []
        running: dict[int, tuple[RequestState, Completion]] = {}
        while len(requests) < len(arrivals) or self.scheduler.busy:
            now_s = time.monotonic() - start_s
            while len(requests) < len(arrivals) and arrivals[len(requests)].at_s <= now_s:
                requests.append(self._arrive(arrivals[len(requests)], len(requests), start_s))
                running |= {id(one.sequence): (requests[-1], one) for one in requests[-1].completions}
            if self.scheduler.busy:
                self._step(running)
            else:
                time.sleep(max(0.0, arrivals[len(requests)].at_s - now_s))
        return requests

    def _arrive(self, arrival: Arrival, number: int, start_s: float) -> RequestState:
        params = SamplingParams(temperature=0.0, max_tokens=arrival.output, ignore_eos=True)
        ids = tuple(prompt(arrival.prompt, seed=number))
        request = self._start(Prompt(None, ids, params, arrival.output))
        request.arrival_s = start_s + arrival.at_s  # it waited for the step in progress
        return request


def figures_of(requests: list[RequestState], elapsed_s: float) -> dict[str, float]:
    """Throughput in tokens/s, and TTFT, TPOT and E2E in seconds by percentile."""
    users = [times(request) for request in requests]
    figures = {"output tokens/s": sum(user["tokens"] for user in users) / elapsed_s}
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
        "tokens": float(tokens),
        "TTFT": request.first_token_s - request.arrival_s,
        "E2E": request.finished_s - request.arrival_s,
    }
    if tokens > 1:
        own["TPOT"] = (request.finished_s - request.first_token_s) / (tokens - 1)
    return own
