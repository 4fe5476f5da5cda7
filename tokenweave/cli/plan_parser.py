"""The parser of `tokenweave plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import fill
from typing import Any

from tokenweave.cli.options import above_zero, or_none, positive
from tokenweave.cli.parser import Parser
from tokenweave.cli.plan_model import families
from tokenweave.cost.hardware import KNOWN
from tokenweave.cost.shape import DTYPE_BYTES
from tokenweave.cost.sizing import WHAT_IF
from tokenweave.cost.work import Chunk
from tokenweave.cost.workload import Workload

DESCRIPTION = """\
What a model needs and does on so many GPUs, predicted: latencies, throughput, memory, what bounds each phase, and from
how many tokens on overlapping communication pays. Needs no GPU and no weights; a config.json is enough."""

EPILOG = f"""\
examples:
  tokenweave plan Llama-3.3-70B                                       the fewest GPUs that serve one request at once
  tokenweave plan Qwen/Qwen3-32B --tp 4 --prompt-len 4096 --batch-size 32
  tokenweave plan ./my-model/config.json --hardware l40s --request-rate 2 --ttft-ms 500 --tpot-ms 50
  tokenweave plan Llama-3.3-70B --tp 8 --what-if link=0.5 --what-if flops=2,bandwidth=1.5
  tokenweave plan Llama-3.3-70B --tp 8 --explain 3000                  why a prompt of 3000 tokens is split, where
  tokenweave plan Llama-3.3-70B --tp 8 --explain 2048@1024+64x1@500    a chunk after 1024 tokens, 64 rows that decode
  tokenweave plan Llama-3.3-70B --tp 8 --plot gain.png --json > plan.json

FILE of --hardware holds the fields of a record, or those that differ from a known one: {{"like": "h100-sxm",
"name": "mine", "memory_bytes": 9.4e10}}; `tokenweave calibrate` writes one. Times are of a model of the machine:
docs/planning.md says what it assumes and how near it was to measurements.

models known by name, in their published sizes; -Instruct and the like may follow:
{fill(", ".join(families()), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)}"""

MOST_ROWS = 1 << 17  # of a step that is explained


def make_parser() -> Parser:
    parser = Parser(
        prog="tokenweave plan", usage="tokenweave plan MODEL [options]", description=DESCRIPTION, epilog=EPILOG
    )
    add_where(parser.add_argument_group("model and machine"))
    add_workload(parser.add_argument_group("workload"))
    add_output(parser.add_argument_group("output"))
    return parser


def add_where(group: Any) -> None:
    group.add_argument(
        "model", metavar="MODEL", help="a published model's name, a Hugging Face folder, its config.json, or a hub id"
    )
    group.add_argument(
        "--hardware",
        default="h100-sxm",
        metavar="NAME|FILE",
        help=f"{', '.join(known.name for known in KNOWN)}, or a .json file (default: %(default)s)",
    )
    group.add_argument(
        "--tp",
        "--tensor-parallel-size",
        dest="world_size",
        type=positive,
        metavar="N",
        help="GPUs that share the model (default: the fewest that serve the workload)",
    )
    group.add_argument(
        "--dtype", choices=list(DTYPE_BYTES), help="of weights, activations and cache (default: the model's own)"
    )
    group.add_argument(
        "--collectives",
        type=Path,
        metavar="DIR",
        help="measured all-reduce curves (tokenweave_figure_4.csv, tokenweave_figure_10.csv) in place of data sheets",
    )


def add_workload(group: Any) -> None:
    default = Workload()
    for flag, kind, words in (
        ("--prompt-len", positive, "of a request's prompt"),
        ("--output-len", positive, "that a request gets"),
        ("--step-tokens", step_tokens, "of one step at most; longer prompts are computed in chunks"),
    ):
        name = flag.lstrip("-").replace("-", "_")
        shown = f"{words} (default: %(default)s)"
        group.add_argument(flag, type=kind, default=getattr(default, name), metavar="TOKENS", help=shown)
    load = group.add_mutually_exclusive_group()
    load.add_argument(
        "--batch-size",
        type=positive,
        default=default.batch_size,
        metavar="N",
        help="requests at once (default: %(default)s)",
    )
    load.add_argument(
        "--request-rate", type=or_none(above_zero), metavar="R", help="requests that come a second, instead of a batch"
    )
    group.add_argument("--ttft-ms", type=or_none(above_zero), metavar="MS", help="target: mean time to the first token")
    group.add_argument("--tpot-ms", type=or_none(above_zero), metavar="MS", help="target: time between tokens")


def add_output(group: Any) -> None:
    group.add_argument(
        "--what-if",
        type=what_if,
        action="append",
        default=[],
        metavar="X=F,...",
        help=f"the same with {', '.join(WHAT_IF)} times a factor; as often as needed",
    )
    group.add_argument(
        "--explain",
        type=batch,
        metavar="BATCH",
        help="why a step with this batch is split or not: [COUNTx]TOKENS[@CONTEXT], several with + between",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object and nothing else; times in seconds")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw step times and gains by token count")


def step_tokens(text: str) -> int:
    """Each step of a prompt is looked at: fewer tokens would take minutes."""
    return positive(text, least=128)


def what_if(text: str) -> dict[str, float]:
    """ "flops=2,link=0.5" as numbers. Raises argparse's error for anything else."""
    factors = {}
    for part in text.split(","):
        name, _, factor = part.partition("=")
        if name not in WHAT_IF or not in_reason(factor):
            raise argparse.ArgumentTypeError(
                f"expected factors from 0.001 to 1000 of {', '.join(WHAT_IF)}, such as flops=2,link=0.5; got {part!r}"
            )
        factors[name] = float(factor)
    return factors


def in_reason(text: str) -> bool:
    try:
        return 1e-3 <= float(text) <= 1e3
    except ValueError:
        return False


def batch(text: str) -> tuple[Chunk, ...]:
    """ "2048@1024+64x1@500" as chunks. Raises argparse's error for anything else."""
    chunks: list[Chunk] = []
    for part in text.split("+"):
        count, _, rest = part.rpartition("x")
        tokens, _, context = rest.partition("@")
        numbers = [count or "1", tokens, context or "0"]
        if not all(number.isdecimal() for number in numbers) or 0 in (int(numbers[0]), int(numbers[1])):
            raise argparse.ArgumentTypeError(
                f"expected [COUNTx]TOKENS[@CONTEXT] with + between, such as 2048@1024+64x1@500; got {part!r}"
            )
        chunks += [Chunk(int(numbers[1]), int(numbers[2]))] * min(int(numbers[0]), MOST_ROWS)
        if sum(chunk.tokens for chunk in chunks) > MOST_ROWS:
            raise argparse.ArgumentTypeError(f"expected at most {MOST_ROWS} tokens in one step, got {text!r}")
    return tuple(chunks)
