"""The host's work in one decode step, part by part. Needs no GPU, no model and a minute at most.

The engine's own loop runs as on CUDA, scheduling overlapped and steps captured, but on a device that does nothing, and
each step is sent to followers that only receive. Sequences of about `--context` tokens decode. Figures are microseconds
on rank 0: medians over the steps of the quietest of `--rounds` rounds. `unpack` is what a follower does to a message,
which then goes on with `forward` and `sample`. What is missing: what CUDA takes to launch a copy, a graph and a kernel.
Drawing a token is computed here, of a small vocabulary, so that of `sample` only the plain, greedy one is the host's.

Usage: python -m perf.host [--rows 1 8 64 256] [--context 1024] [--ranks 2] [--json FILE] [--write]; --write puts the
table into perf/results/host.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from perf.timing import machine
from tokenweave import SamplingParams
from tokenweave.comm.group import Ranks, Rendezvous, join, leave_default_group
from tokenweave.config import EngineConfig
from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.planner import Planner
from tokenweave.cost.published import PUBLISHED
from tokenweave.engine import engine as engine_module
from tokenweave.engine.attention import Backends
from tokenweave.engine.engine import Engine
from tokenweave.engine.histories import Histories
from tokenweave.engine.request import Prompt
from tokenweave.engine.runner import Runner
from tokenweave.engine.vocabulary import Vocabulary

REPORT = Path(__file__).parent / "results" / "host.md"
MODEL, GPU, WORLD_SIZE = "Llama-3.1-8B", "h100-sxm", 8  # that plans are for
BLOCK_SIZE, VOCABULARY = 16, 512
TIMEOUT_S = 60.0
WARM_STEPS = 6  # the prompts, and what is captured
CPU = torch.device("cpu")
PARTS = ("schedule", "describe", "plan", "launched", "send", "forward", "sample", "fetch", "take in", "the rest")


# -- a clock -----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of each part of each step, without those of the parts inside it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = [defaultdict(float)]
        self.inside: list[float] = []  # seconds of inner parts, of every part that runs

    def watch(self, part: str, owner: Any, name: str) -> None:
        setattr(owner, name, self.timed(part, getattr(owner, name)))

    def timed(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def watched(*args: Any, **options: Any) -> Any:
            self.inside.append(0.0)
            start_s = time.perf_counter()
            result = run(*args, **options)
            taken_s = time.perf_counter() - start_s
            self.steps[-1][part] += taken_s - self.inside.pop()
            if self.inside:
                self.inside[-1] += taken_s
            return result

        return watched

    def medians_us(self) -> dict[str, float]:
        return {part: 1e6 * statistics.median(step[part] for step in self.steps) for part in PARTS}


# -- an engine without a device ----------------------------------------------------------------------------------------


class Silent:
    """A communicator that has nothing to report."""

    transport = None

    def check(self) -> None: ...


class Idle(Runner):
    """A runner whose device does nothing: the host's side of captured steps alone."""

    def __init__(self, config: EngineConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.spec: Any = SimpleNamespace(num_layers=32, vocab_size=VOCABULARY, rope={}, max_position=1 << 20)
        self.max_model_len = config.max_model_len or 0
        self.meter, self.recorder, self.histories = None, None, Histories(CPU)
        self.communicator: Any = Silent()
        self.storage = torch.empty(config.num_kv_blocks or 0, 0)
        self.capturer: Any = SimpleNamespace(capture=lambda run: run() or (lambda: None))
        backend: Any = lambda spans, tables: None  # noqa: E731
        self.attention = Backends(backend, backend)
        self.steps, self.queued = 0, "nothing"
        self.graph_tokens, self.most_graphs = config.cuda_graph_max_tokens or 0, 8

    def queue(self, bucket: Any, parts: Any, inputs: Any, attentions: Any, previous: Tensor) -> list[Tensor]:
        return [torch.randn(capacity.rows, VOCABULARY) for capacity in bucket.halves]


def make_engine(options: argparse.Namespace, rows: int, ranks: Ranks) -> Engine:
    length = options.context + BLOCK_SIZE + options.rounds * options.steps + WARM_STEPS
    config = EngineConfig(
        MODEL,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * length,
        cuda_graph_max_tokens=rows * length,
        max_model_len=length,
        block_size=BLOCK_SIZE,
        num_kv_blocks=rows * (length // BLOCK_SIZE + 2),
        async_scheduling=True,
        progress=False,
    )
    planner = Planner("auto", Cost(PUBLISHED[MODEL], find_hardware(GPU), WORLD_SIZE, graph=True), most_rows=2048)
    alone = Ranks(0, 1, CPU, TIMEOUT_S, None, None)  # followers have no runner to agree with
    return Engine(config, ranks, Idle(config, alone), Vocabulary(tokenizer(), ()), planner)


def tokenizer() -> PreTrainedTokenizerFast:
    """Two letters a token; as fast as one of a large vocabulary."""
    whole = Tokenizer(models.BPE({chr(97 + i // 26) + chr(97 + i % 26): i for i in range(VOCABULARY)}, []))
    whole.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=whole)


def prompts(options: argparse.Namespace, rows: int) -> list[Prompt]:
    """Of all lengths within a block, so that in each step some sequences begin one."""
    params = SamplingParams(temperature=0.0, max_tokens=None)
    most = options.rounds * options.steps + WARM_STEPS
    lengths = [options.context + i % BLOCK_SIZE for i in range(rows)]
    return [
        Prompt(None, tuple((7 * i + at) % VOCABULARY for at in range(n)), params, most) for i, n in enumerate(lengths)
    ]


# -- what is timed -----------------------------------------------------------------------------------------------------


def step_us(options: argparse.Namespace, rows: int, ranks: Ranks) -> dict[str, float]:
    """Microseconds by part, and bytes of a step's message."""
    engine, clock = make_engine(options, rows, ranks), Clock()
    told: dict[str, Any] = {}
    for part, owner, name in (
        ("schedule", engine.scheduler, "schedule"),
        ("describe", engine, "_describe"),
        ("plan", engine.planner, "plan"),
        ("launched", engine.scheduler, "launched"),
        ("forward", engine.runner, "forward"),
        ("fetch", engine.runner, "fetch"),
        ("take in", engine, "_take_in"),
    ):
        clock.watch(part, owner, name)
    send = clock.timed("send", ranks.send)
    engine.ranks = cast(Ranks, SimpleNamespace(send=lambda message: told.update(last=message) or send(message)))
    with mock.patch.object(engine_module, "sample", clock.timed("sample", engine_module.sample)):
        least = min(rounds(options, clock, engine.run(prompts(options, rows))), key=lambda parts: sum(parts.values()))
    payload = pickle.dumps(told["last"], protocol=pickle.HIGHEST_PROTOCOL)
    return least | {"unpack": unpack_us(payload, options.rounds), "bytes": len(payload)}


def rounds(options: argparse.Namespace, clock: Clock, steps: Iterator[Any]) -> Iterator[dict[str, float]]:
    step = clock.timed("the rest", lambda: next(steps))
    with torch.inference_mode():
        for _ in range(WARM_STEPS):
            step()
        for _ in range(options.rounds):
            clock.steps.clear()
            for _ in range(options.steps):
                clock.steps.append(defaultdict(float))
                step()
            yield clock.medians_us()


def unpack_us(payload: bytes, rounds: int) -> float:
    clock = Clock()
    for _ in range(10 * rounds):
        clock.timed("unpack", pickle.loads)(payload)
        clock.steps.append(defaultdict(float))
    return 1e6 * min(step["unpack"] for step in clock.steps[:-1])


@contextmanager
def followed(world_size: int) -> Iterator[Ranks]:
    """Rank 0 of so many processes; the others receive and do nothing else."""
    if world_size == 1:
        yield Ranks(0, 1, CPU, TIMEOUT_S, None, None)
        return
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meetings = [Rendezvous(store.port, rank, world_size) for rank in range(world_size)]
    start = multiprocessing.get_context("spawn").Process
    others = [start(target=receive_all, args=(meeting,), daemon=True) for meeting in meetings[1:]]
    for other in others:
        other.start()
    ranks = join(CPU, TIMEOUT_S, meetings[0])
    yield ranks
    ranks.send(None)
    for other in others:
        other.join(TIMEOUT_S)
    ranks.leave()
    leave_default_group()


def receive_all(meeting: Rendezvous) -> None:
    torch.set_num_threads(1)
    ranks = join(CPU, TIMEOUT_S, meeting)
    while ranks.receive() is not None:
        pass
    ranks.leave()
    leave_default_group()


# -- the table ---------------------------------------------------------------------------------------------------------


def table(found: dict[int, dict[str, float]]) -> str:
    """A column for each row count."""
    lines = [cells("us of a step", [f"{rows} rows" for rows in found]), cells("---", ["---:"] * len(found))]
    lines += [cells(part, [f"{us[part]:.0f}" for us in found.values()]) for part in PARTS]
    lines.append(cells("**rank 0 in all**", [f"**{total_us(us, PARTS):.0f}**" for us in found.values()]))
    lines.append(cells("unpack, by a follower", [f"{us['unpack']:.0f}" for us in found.values()]))
    follower = ("unpack", "forward", "sample")
    lines.append(cells("**a follower in all**", [f"**{total_us(us, follower):.0f}**" for us in found.values()]))
    return "\n".join([*lines, cells("bytes sent to each", [f"{us['bytes']:.0f}" for us in found.values()])])


def cells(name: str, values: Sequence[str]) -> str:
    return "| " + " | ".join([name, *values]) + " |"


def total_us(parts: dict[str, float], names: Sequence[str]) -> float:
    return sum(parts[name] for name in names)


def report(found: dict[int, dict[str, float]], options: argparse.Namespace) -> str:
    about = (__doc__ or "").split("\n\nUsage")[0]
    counts = " ".join(map(str, options.rows))
    made = f"`python -m perf.host --rows {counts} --context {options.context} --ranks {options.ranks} --write`"
    on = ", ".join(f"{name} {value}" for name, value in machine().items() if not isinstance(value, dict))
    return "\n\n".join(["# The host's work in a decode step", about, f"Made by {made}: {on}.", table(found)]) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--ranks", type=int, default=2, help="processes, which all run here")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=16, help="of a round")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--write", action="store_true", help=f"write the report to perf/results/{REPORT.name}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    with followed(options.ranks) as ranks:
        found = {rows: step_us(options, rows, ranks) for rows in options.rows}
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "us": found}, indent=1) + "\n", encoding="utf-8")
    if options.write:
        REPORT.write_text(report(found, options), encoding="utf-8")


if __name__ == "__main__":
    main()
