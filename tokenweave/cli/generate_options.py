"""What `tokenweave generate` can be told."""

from __future__ import annotations

from tokenweave.cli.options import Option, add_options
from tokenweave.cli.parser import Parser
from tokenweave.config import DEVICES, DTYPES, OVERLAPS, EngineConfig
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

MODEL = (
    Option(
        "tensor_parallel_size",
        "ranks to split the model over; a plain process starts them on this machine (default: 1, or all that torchrun "
        "started)",
        "N",
    ),
    Option("dtype", "of weights and activations; auto: the checkpoint's own on CUDA, float32 on a CPU", choices=DTYPES),
    Option("device", "auto: CUDA where there is one", choices=DEVICES),
    Option(
        "overlap",
        "off: plain all-reduce, the baseline; fused: sums in shards, batches not split; weave: two halves, one computes "
        "while the other's sum is on the wire; auto: what is measured to be fastest",
        choices=OVERLAPS,
    ),
)

SAMPLING = (
    Option("temperature", "0 takes the likeliest token; more is more random", "T", default=0.0),
    Option("max_tokens", "most tokens to generate for a prompt; none: up to the model's length", "N", default=32),
    Option("min_tokens", "do not stop before this many tokens", "N"),
    Option("n", "completions of each prompt; more than one need a temperature > 0", "N"),
    Option("top_p", "sample from the likeliest tokens that together have this probability; 1: all", "P"),
    Option("top_k", "sample from the K likeliest tokens; 0: all", "K"),
    Option("min_p", "leave out tokens less likely than P times the likeliest; 0: none", "P"),
    Option("seed", "draw every prompt's tokens from this seed, whatever else runs", "SEED", name="request_seed"),
    Option("stop", "end a completion before this text; may be given several times", "TEXT"),
    Option("stop_token_ids", "end a completion after this token; may be given several times", "ID", name="stop_token_id"),
    Option("ignore_eos", "go on after the model's end-of-sequence token"),
    Option("include_stop_str_in_output", "keep the stop text in the completion", name="include_stop"),
    Option("skip_special_tokens", "show special tokens in the text", name="skip_special_tokens"),
    Option("repetition_penalty", "> 1 makes tokens of prompt and completion less likely", "X"),
    Option("presence_penalty", "subtracted from the logits of tokens that the completion has", "X"),
    Option("frequency_penalty", "the same, once for each time that it has them", "X"),
    Option("logprobs", "report log-probabilities of the K likeliest tokens; shown by --json", "K"),
)

ENGINE = (
    Option("max_num_batched_tokens", "tokens of one step, prefill and decode together", "N"),
    Option("max_num_seqs", "sequences that run at once", "N"),
    Option("max_model_len", "most tokens of a prompt and its completion (default: what the model was made for)", "N"),
    Option("block_size", "tokens of one block of the KV cache", "N"),
    Option("num_kv_blocks", "blocks of the KV cache (default: as needed, within a share of the free memory)", "N"),
    Option("enable_prefix_caching", "do not reuse the keys and values of equal beginnings", name="prefix_caching"),
    Option("seed", "what prompts without --request-seed draw from", "SEED"),
    Option("timeout_s", "the bound on every wait for another rank", "SECONDS"),
)

OUTPUT = (
    Option(
        "trace",
        "write a timeline of all lanes for ui.perfetto.dev to FILE, a picture of it beside (.png), and say how much of "
        "the communication was hidden",
        "FILE",
    ),
    Option("progress", "no progress bars (there are none either where standard error is no terminal)"),
)


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


def add_model(parser: Parser, embedded: str) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=embedded,
        metavar="PATH_OR_HUB_ID",
        help="a Hugging Face folder or hub id (default: the embedded model, which adds numbers: 12+34= gives 46)",
    )
    add_options(group, EngineConfig, MODEL)


def add_prompts(parser: Parser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="a text to complete; - stands for the lines of standard input (default with the embedded model: a few sums)",
    )
    group.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; blank lines are left out")
    group.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message; the model's chat template is applied"
    )


def add_engine(parser: Parser) -> None:
    group = parser.add_argument_group("engine")
    add_options(group, EngineConfig, ENGINE)
    group.add_argument(
        "--link-gbit-per-s",
        type=float,
        metavar="X",
        help="simulate a link: slow communication down to X Gbit/s (CPU only; the times shown are then simulated)",
    )
    group.add_argument(
        "--link-latency-us",
        type=float,
        default=0.0,
        metavar="Y",
        help="of the simulated link, microseconds (default: %(default)s)",
    )


def add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--stream", action="store_true", help="print tokens as they come")
    group.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object and nothing else; with --stream a JSON line for each piece of text comes first",
    )
    add_options(group, EngineConfig, OUTPUT)
