"""Weaving over a simulated link: every mode for one prefill at W=2, the comm lane paced to a given speed.

The pace is chosen so that communication is about half of a step of "off". Every mode runs on three wires: gloo really
sends the bytes and then sleeps until the simulated wire would be done; a wire that only sleeps and sends nothing
(results are wrong by design), which shows what gloo's own CPU time costs on cores that are already full; and loopback
as it is, where on full cores nothing can be gained, and "auto" must not lose.
Usage: torchrun --nproc-per-node 2 -m perf.paced [--shape ...] [--tokens N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from perf.overlap.silent import SilentTransport
from perf.shapes import SHAPES, model_folder, prompt
from perf.timing import interleaved
from tokenweave.comm.link import Link, PacedTransport
from tokenweave.config import EngineConfig
from tokenweave.cost.measure import measure_step_times
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.rank import Rank, open_rank
from tokenweave.weave.plan import Plan, StepTimes, plan_step

MODES = ("off", "fused", "weave", "auto")
WIRES = {
    "sends": "simulated link: sends, then sleeps",
    "sleeps": "simulated link: sleeps only",
    "loopback": "loopback as it is",
}


def measure(rank: Rank, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds by wire and mode, and the link they were taken on."""
    communicator, spec = rank.runner.communicator, rank.runner.spec
    gloo, silent = communicator.transport, SilentTransport(rank.ranks.rank, rank.ranks.world_size)
    batch = prefill(rank, tokens)

    def step(transport: Any, mode: str, times: StepTimes | None = None) -> None:
        communicator.transport = transport
        rank.runner.forward(batch, plan_step(mode, batch.rows, times))

    compute_s = statistics.median(interleaved({"compute": lambda: step(silent, "off")}, rounds)["compute"])
    sums = 2 * spec.num_layers  # the last MLP's sum is of one row
    sum_bytes = tokens * spec.hidden_size * rank.runner.dtype.itemsize
    link = Link(bandwidth_bytes_per_s=rank.ranks.gather(sums * sum_bytes / compute_s)[0])
    wires = {"sends": PacedTransport(gloo, link), "sleeps": PacedTransport(silent, link), "loopback": gloo}
    contestants: dict[str, Callable[[], None]] = {"compute": partial(step, silent, "off")}
    chosen = {}
    for wire, transport in wires.items():
        communicator.transport = transport
        times = measure_step_times(rank.runner)  # what "auto" decides by, as when an LLM starts
        chosen[wire] = mode_of(plan_step("auto", batch.rows, times))
        contestants |= {f"{wire} {mode}": partial(step, transport, mode, times) for mode in MODES}
    seconds = interleaved(contestants, rounds)
    return {"link_gbit_per_s": link.bandwidth_bytes_per_s * 8e-9, "seconds": seconds, "auto_chose": chosen}


def mode_of(plan: Plan) -> str:
    if plan.cut is not None:
        return "weave"
    return "off" if plan.form == "reference" else "fused"


def prefill(rank: Rank, tokens: int) -> Batch:
    blocks = tuple(range(-(-tokens // rank.runner.config.block_size)))
    return Batch((Span(tuple(prompt(tokens)), 0, blocks, prompt_len=tokens, wanted=1),))


def table(result: dict[str, Any], tokens: int, shape: str) -> str:
    """Ratios are medians over rounds of (mode / off in the same round)."""
    seconds = result["seconds"]
    lines = [
        f"{shape}, prefill of {tokens} tokens, W=2, simulated link of {result['link_gbit_per_s']:.2f} Gbit/s, "
        f"compute alone {statistics.median(seconds['compute']):.3f} s",
        "",
        "| wire | mode | median, s | of off | spread |",
        "|---|---|---|---|---|",
    ]
    for wire, words in WIRES.items():
        for mode in MODES:
            mine, off = seconds[f"{wire} {mode}"], seconds[f"{wire} off"]
            ratios = [a / b for a, b in zip(mine, off, strict=True)]
            spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
            name = f"auto (chose {result['auto_chose'][wire]})" if mode == "auto" else mode
            lines.append(
                f"| {words} | {name} | {statistics.median(mine):.3f} | {statistics.median(ratios):.3f} | {spread} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-512x8")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    folder = model_folder(options.shape)
    rank = open_rank(EngineConfig(str(folder), overlap="off", progress=False, num_kv_blocks=256))
    result = measure(rank, options.tokens, options.rounds)
    rank.close()
    if int(os.environ["RANK"]) == 0:
        print(table(result, options.tokens, options.shape))
        if options.json:
            options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
