"""`tokenweave tune`: find the fastest way to run a model's steps on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tokenweave import embedded
from tokenweave.cli.bar import Bar
from tokenweave.cli.generate import quieten
from tokenweave.cli.generate_options import ENGINE, MODEL
from tokenweave.cli.generate_parser import add_engine, add_model
from tokenweave.cli.link import link
from tokenweave.cli.options import above_zero, chosen
from tokenweave.cli.parser import Parser
from tokenweave.config import EngineConfig
from tokenweave.cost.journal import Journal
from tokenweave.cost.session import Session, describe
from tokenweave.cost.tuned import VERSION, Key, Store, TunedLimits, TunedStep
from tokenweave.engine.at_hand import cost_of, key_of
from tokenweave.engine.stepper import Stepper

LEAST_ROWS = 64  # of the default row counts

DESCRIPTION = """\
Run real steps of a model, split and unsplit, and keep what was fastest for each row count: where to cut, SMs for each
sum, from how many rows on splitting pays, and in chunks of how many tokens to compute long prompts. The cost model and
what was tuned before say where to look. A run that was ended goes on where it stood."""

EPILOG = """\
examples:
  tokenweave tune --model PATH_OR_HUB_ID --tensor-parallel-size 2 --budget 60
  tokenweave tune --tensor-parallel-size 2 --link-gbit-per-s 1          the embedded model, over a simulated link
  torchrun --nproc-per-node 8 -m tokenweave.cli tune --model PATH_OR_HUB_ID --rows 512,1024,2048,4096,8192"""

ENGINE_FIELDS = ("max_num_batched_tokens", "max_model_len", "block_size", "num_kv_blocks", "timeout_s")


def parser() -> Parser:
    parser = Parser(prog="tokenweave tune", usage="tokenweave tune [options]", description=DESCRIPTION, epilog=EPILOG)
    add_model(parser, str(embedded.path()), model_options())
    add_search(parser.add_argument_group("search"))
    add_engine(parser, engine_options())
    return parser


def add_search(group: Any) -> None:
    group.add_argument(
        "--budget", type=above_zero, default=120.0, metavar="SECONDS", help="to measure in (default: %(default)s)"
    )
    group.add_argument(
        "--rows",
        type=row_counts,
        metavar="N,N,...",
        help=f"row counts to tune (default: powers of two from {LEAST_ROWS} to the largest step)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    group.add_argument("--output", type=Path, metavar="FOLDER", help="keep the plans here, not in the cache folder")
    group.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


def model_options() -> list[Any]:
    return [option for option in MODEL if option.field != "overlap"]


def engine_options() -> list[Any]:
    return [option for option in ENGINE if option.field in ENGINE_FIELDS]


def row_counts(text: str) -> tuple[int, ...]:
    """Raises argparse's error for anything but numbers with commas between."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected row counts with commas between, such as 256,512,1024; got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


@dataclass(frozen=True)
class Result:
    """What a run came to. paths: of the files that keep it."""

    key: Key
    folder: Path
    steps: list[TunedStep]
    limits: TunedLimits | None
    measurements: int
    seconds: float


def run(options: argparse.Namespace, out: TextIO) -> None:
    quieten()
    stepper = Stepper(engine_config(options))
    failed = True
    try:
        if not stepper.leads:
            stepper.follow()
        else:
            result = tune(options, stepper)
            out.write(json.dumps(record(result)) + "\n" if options.json else table(result))
        failed = False
    finally:
        stepper.close(failed)


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """Raises ValueError for what cannot be."""
    fields: dict[str, Any] = chosen(options, (*model_options(), *engine_options()))
    fields |= {"progress": options.progress and sys.stderr.isatty(), "overlap": "off"}
    return EngineConfig(model=options.model, link=link(options), **fields)


def tune(options: argparse.Namespace, stepper: Stepper) -> Result:
    """Rank 0's part: search, and store what was found."""
    cost, rows, store = cost_of(stepper.rank.runner), rows_of(options, stepper), Store(options.output)
    key = key_of(stepper.rank.runner)
    folder = store.folder / key.folder
    about = {"version": VERSION, "shape": key.shape, "world_size": key.world_size, "hardware": key.hardware}
    journal = Journal(folder / "journal.jsonl", about | {"rows": list(rows), "seed": options.seed})
    done = False
    try:
        with Bar("tuning", options.budget, options.progress) as bar:
            near = store.nearest(key)
            session = Session(
                cost,
                rows,
                lambda case: journal.measured(*case, partial(stepper.seconds, case)),
                time.monotonic,
                options.budget,
                seed=options.seed,
                stored=near,
                same_key=near is not None and near.key == key,
                report=bar.update,
            )
            start_s = time.monotonic()
            steps, limits = session.run()
        # At the end, not one by one: a run that goes on would else find its own plans, and take another turn.
        for step in steps:
            store.write_step(key, step)
        if limits is not None:
            store.write_limits(key, limits)
        done = True
        return Result(key, folder, steps, limits, len(session.measured), time.monotonic() - start_s)
    finally:
        journal.close(done)


def rows_of(options: argparse.Namespace, stepper: Stepper) -> tuple[int, ...]:
    """Raises ValueError for steps that there is no room for."""
    most = stepper.most_rows
    if options.rows is None:
        powers = (2**power for power in range(most.bit_length()) if LEAST_ROWS <= 2**power <= most)
        return tuple(powers) or (most,)
    if options.rows[0] < 1 or options.rows[-1] > most:
        raise ValueError(
            f"--rows must be between 1 and {most}, the largest step that --max-num-batched-tokens, the KV cache and "
            f"the model's length have room for; got {', '.join(map(str, options.rows))}"
        )
    return options.rows


def record(result: Result) -> dict[str, Any]:
    """Everything, for json.dumps. Times are seconds."""
    return {
        "key": asdict(result.key),
        "folder": str(result.folder),
        "steps": [asdict(step) | {"spread": step.spread} for step in result.steps],
        "limits": None if result.limits is None else asdict(result.limits),
        "measurements": result.measurements,
        "seconds": result.seconds,
    }


def table(result: Result) -> str:
    lines = [f"{'rows':>6}  {'fastest':<28}{'time':>11}{'unsplit':>18}{'gain':>7}{'spread':>8}{'measured':>10}"]
    for step in result.steps:
        unsplit = f"{step.unsplit} {step.unsplit_s * 1e3:.2f} ms"
        gain = f"{step.unsplit_s / step.seconds:.2f}x"
        time_ms = f"{step.seconds * 1e3:.2f} ms"
        lines.append(
            f"{step.rows:>6}  {describe(step.choice):<28}{time_ms:>11}{unsplit:>18}{gain:>7}{step.spread:>8.1%}"
            f"{len(step.measured):>10}"
        )
    limits = result.limits
    if limits is None:
        lines.append("nothing was found within the budget; run the same command again, and it goes on")
    else:
        split = "never" if limits.split_threshold is None else f"from {limits.split_threshold} rows on"
        lines += [
            "",
            f"split         {split}",
            f"chunk         {limits.chunk_tokens} tokens (advice: --max-num-batched-tokens)",
        ]
    lines += [
        f"measured      {result.measurements} steps in {result.seconds:.1f} s",
        f"written       {result.folder}",
    ]
    return "\n".join(lines) + "\n"
