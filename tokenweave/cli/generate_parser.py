"""The parser of `tokenweave generate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenweave.cli.generate_options import ENGINE, MODEL, OUTPUT, SAMPLING
from tokenweave.cli.link import add_link
from tokenweave.cli.options import Option, add_options
from tokenweave.cli.parser import Parser
from tokenweave.config import EngineConfig
from tokenweave.sampling_params import SamplingParams

DESCRIPTION = """\
Complete prompts with a language model, its layers split over several ranks (GPUs, or processes on CPUs), while one
half of each batch computes during the other half's communication."""

EPILOG = """\
examples:
  tokenweave generate                                           the embedded model adds a few numbers
  tokenweave generate '12+34=' --tensor-parallel-size 2 --overlap weave --trace timeline.json
  tokenweave generate --model PATH_OR_HUB_ID 'Once upon a time' --max-tokens 100 --stream
  tokenweave generate --model PATH_OR_HUB_ID --chat 'What is a loom?' --temperature 0.7 --top-p 0.9
  tokenweave generate --model PATH_OR_HUB_ID --prompts-file prompts.txt --json > completions.json
  torchrun --nproc-per-node 8 -m tokenweave.cli generate --model PATH_OR_HUB_ID 'Once upon a time'

exit codes: 0 done, 1 a failure, 2 bad usage or input, 130 interrupted. Errors are one line on standard error."""


def make_parser(embedded: str) -> Parser:
    """The parser of `tokenweave generate`. embedded: the folder of the default model."""
    parser = Parser(
        prog="tokenweave generate",
        usage="tokenweave generate [options] [PROMPT ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_model(parser, embedded)
    add_prompts(parser)
    add_options(parser.add_argument_group("sampling"), SamplingParams, SAMPLING)
    add_engine(parser)
    add_output(parser)
    return parser


def add_model(parser: Parser, embedded: str, options: Iterable[Option] = MODEL) -> Any:
    """Returns the group."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=embedded,
        metavar="PATH_OR_HUB_ID",
        help="a Hugging Face folder or hub id (default: the embedded model, which adds numbers: 12+34= gives 46)",
    )
    add_options(group, EngineConfig, options)
    return group


def add_prompts(parser: Parser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="a text to complete; - stands for the lines of standard input (default: some sums for the embedded model)",
    )
    group.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; blank lines are left out")
    group.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message; the model's chat template is applied"
    )


def add_engine(parser: Parser, options: Iterable[Option] = ENGINE) -> None:
    group = parser.add_argument_group("engine")
    add_options(group, EngineConfig, options)
    add_link(group)


def add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--stream", action="store_true", help="print tokens as they come")
    group.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object and nothing else; with --stream a JSON line for each piece of text comes first",
    )
    add_options(group, EngineConfig, OUTPUT)
