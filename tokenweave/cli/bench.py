"""`tokenweave bench`: how fast a model generates on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from random import Random
from typing import Any, TextIO

from tokenweave import embedded
from tokenweave.cli.bench_parser import ENGINE_OPTIONS, MODEL_OPTIONS, make_parser
from tokenweave.cli.bench_report import Load, Report, Round, record, result_of, round_of
from tokenweave.cli.bench_table import table
from tokenweave.cli.generate import quieten
from tokenweave.cli.link import link
from tokenweave.cli.options import chosen
from tokenweave.cli.parser import Parser
from tokenweave.cli.setup import setup_of
from tokenweave.config import EngineConfig
from tokenweave.engine.prompts import Limits
from tokenweave.llm import LLM
from tokenweave.sampling_params import SamplingParams

# What a round may hold, some gigabytes of the host: a request takes kilobytes, a token is a Python integer.
MOST_PROMPTS = 100_000
MOST_TOKENS = 100_000_000


def parser() -> Parser:
    return make_parser(str(embedded.path()))


def run(options: argparse.Namespace, out: TextIO) -> None:
    quieten()
    load = Load(options.prompt_len, options.output_len, options.num_prompts, options.rounds, options.seed)
    check_size(load)
    with LLM(**vars(engine_config(options))) as llm:
        setup = setup_of(llm, options.overlap)
        check_length(load, llm.limits)
        rounds = measure(llm, load, options.overlap)
    first = rounds[options.overlap[0]]
    report = Report(setup, load, [result_of(overlap, each, first) for overlap, each in rounds.items()])
    out.write(json.dumps(record(report)) + "\n" if options.json else table(report))


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """Prefixes are not cached, or no round but the first would compute its prompts. Raises ValueError for what cannot
    be."""
    fields: dict[str, Any] = chosen(options, (*MODEL_OPTIONS, *ENGINE_OPTIONS))
    fields |= {"overlap": "auto" if len(options.overlap) > 1 else options.overlap[0]}
    fields |= {"progress": options.progress and sys.stderr.isatty(), "enable_prefix_caching": False}
    return EngineConfig(model=options.model, link=link(options), **fields)


def check_size(load: Load) -> None:
    """Raises ValueError for more than a host holds."""
    if load.num_prompts > MOST_PROMPTS or load.tokens > MOST_TOKENS:
        raise ValueError(
            f"a round of {load.num_prompts:,} prompts and {load.tokens:,} tokens is too large: at most "
            f"{MOST_PROMPTS:,} prompts and {MOST_TOKENS:,} tokens; lower --num-prompts, --prompt-len or --output-len"
        )


def check_length(load: Load, limits: Limits) -> None:
    """Raises ValueError for requests that would be cut short."""
    longest = max(load.prompt_lens) + load.output_len
    if longest > limits.max_model_len:
        raise ValueError(
            f"a request of {longest} tokens (--prompt-len {max(load.prompt_lens)}, --output-len {load.output_len}) is "
            f"longer than the model's length or --max-model-len, {limits.max_model_len}; lower them"
        )


def measure(llm: LLM, load: Load, overlaps: tuple[str, ...]) -> dict[str, list[Round]]:
    """Rounds by overlap, in turn. The first of each, which compiles and allocates, is left out, and so is on a GPU the
    second, which captures what comes again."""
    prompts = random_prompts(load, llm.limits.vocab_size)
    params = SamplingParams(temperature=0.0, max_tokens=load.output_len, ignore_eos=True)
    rounds: dict[str, list[Round]] = defaultdict(list)
    warm_ups = 2 if llm.device.type == "cuda" else 1
    for number in range(warm_ups + load.rounds):
        for overlap in overlaps:
            llm.plan_by(overlap)
            outputs = list(llm.generate(prompts, params))
            if number >= warm_ups:
                rounds[overlap].append(round_of(outputs))
    return rounds


def random_prompts(load: Load, vocab_size: int) -> list[list[int]]:
    random, lens = Random(load.seed), load.prompt_lens
    return [random.choices(range(vocab_size), k=lens[i % len(lens)]) for i in range(load.num_prompts)]
