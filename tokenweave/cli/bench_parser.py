"""The parser of `tokenweave bench`."""

from __future__ import annotations

import argparse
from typing import Any

from tokenweave.cli.generate_options import ENGINE, MODEL
from tokenweave.cli.generate_parser import add_engine, add_model
from tokenweave.cli.options import positive
from tokenweave.cli.parser import Parser
from tokenweave.config import OVERLAPS

DESCRIPTION = """\
How fast a model generates on this machine: latencies and tokens/s for prompts of random tokens, of exact lengths. With
--load-format dummy a folder with a config.json is enough: no weights, no tokenizer."""

EPILOG = """\
examples:
  tokenweave bench                                                        the embedded model: is everything there?
  tokenweave bench --model PATH_OR_HUB_ID --load-format dummy --tp 8 --prompt-len 1024 --output-len 128
  tokenweave bench --model PATH_OR_HUB_ID --tp 8 --prompt-len 4096 --output-len 1 --overlap off,fused,weave,auto
  tokenweave bench --tp 2 --overlap off,weave --link-gbit-per-s 1         over a simulated link
  torchrun --nproc-per-node 8 -m tokenweave.cli bench --model PATH_OR_HUB_ID --num-prompts 64 --json

`tokenweave plan MODEL` predicts the same figures without the hardware. TTFT: time to the first token, TPOT: time for
each one after it."""

MODEL_OPTIONS = tuple(option for option in MODEL if option.field != "overlap")
ENGINE_OPTIONS = tuple(option for option in ENGINE if option.field not in ("enable_prefix_caching", "seed"))


def make_parser(embedded: str) -> Parser:
    """embedded: the folder of the default model."""
    parser = Parser(prog="tokenweave bench", usage="tokenweave bench [options]", description=DESCRIPTION, epilog=EPILOG)
    model = add_model(parser, embedded, MODEL_OPTIONS)
    model.add_argument(
        "--overlap",
        type=overlaps,
        default=("auto",),
        metavar="MODE,...",
        help=f"of {', '.join(OVERLAPS)}: see tokenweave generate --help. Several are run in turn and compared with the "
        "first (default: auto)",
    )
    add_load(parser.add_argument_group("workload"))
    add_engine(parser, ENGINE_OPTIONS)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object and nothing else; times in seconds")
    output.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    return parser


def add_load(group: Any) -> None:
    group.add_argument(
        "--prompt-len",
        "--input-len",
        type=lengths,
        default=(128,),
        metavar="N,...",
        help="tokens of a prompt; of several lengths, prompts take them in turn (default: 128)",
    )
    for flag, default, words in (
        ("--output-len", 64, "tokens to generate for each; its end-of-sequence token is ignored"),
        ("--num-prompts", 8, "prompts, all there from the start; --max-num-seqs of them run at once"),
        ("--rounds", 3, "times to run it all, after one to warm up"),
    ):
        group.add_argument(flag, type=positive, default=default, metavar="N", help=f"{words} (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of the prompts' tokens (default: %(default)s)")


def lengths(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))


def overlaps(text: str) -> tuple[str, ...]:
    """Raises argparse's error for anything but modes with commas between, each once."""
    modes = tuple(part.strip() for part in text.split(","))
    if len(set(modes)) < len(modes) or not set(modes) <= set(OVERLAPS):
        expected = f"some of {', '.join(OVERLAPS)}, each once, with commas between"
        raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}")
    return modes
