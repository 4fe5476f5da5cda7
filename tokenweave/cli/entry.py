"""Entry: from the command line to one command, and from an error to an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import tokenweave
from tokenweave.cli.failure import report
from tokenweave.cli.parser import Parser
from tokenweave.cli.stdout import own_stdout

# A command is a module of this package with parser() -> Parser and run(options, out) -> None, imported only when it is
# asked for: `plan` needs none of the seconds that importing torch takes.
COMMANDS = {
    "generate": "complete prompts with a language model",
    "bench": "measure latency and tokens/s of a model, or of a shape without weights",
    "plan": "predict latency, throughput and memory of a model on so many GPUs",
    "calibrate": "measure this machine: GEMMs, attention, memory, and sums between ranks",
    "tune": "find the fastest way to run a model's steps on this machine, and keep it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `argv` (default: the process's own arguments) and return the exit code: see failure.py."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        run(sys.argv[1:] if argv is None else argv, rank)
    except (Exception, KeyboardInterrupt) as error:
        return report(error, rank)
    return 0


def run(argv: Sequence[str], rank: int) -> None:
    parser = top_parser()
    chosen = parser.parse_args(argv)
    if chosen.command is None:
        parser.error(f"a command is needed: one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"tokenweave.cli.{chosen.command}")
    options = command.parser().parse(chosen.arguments)
    with own_stdout(speaks=rank == 0) as out:
        command.run(options, out)


def top_parser() -> Parser:
    commands = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="tokenweave",
        usage="tokenweave [--help] [--version] COMMAND ...",
        description=tokenweave.__doc__,
        epilog=f"commands:\n{commands}\n\n`tokenweave COMMAND --help` says more of each.",
    )
    parser.add_argument("--version", action="version", version=f"tokenweave {tokenweave.__version__}")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    return parser
