"""`tokenweave generate`: complete prompts."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import transformers

from tokenweave import embedded
from tokenweave.cli.figures import Run, count_woven, figures
from tokenweave.cli.generate_options import ENGINE, MODEL, OUTPUT, SAMPLING
from tokenweave.cli.generate_parser import make_parser
from tokenweave.cli.link import link
from tokenweave.cli.options import chosen
from tokenweave.cli.parser import Parser
from tokenweave.cli.printers import Printer, pick_printer
from tokenweave.cli.prompts import on_every_rank, read_prompts
from tokenweave.cli.setup import setup_of
from tokenweave.config import EngineConfig
from tokenweave.llm import LLM
from tokenweave.outputs import RequestOutput
from tokenweave.sampling_params import SamplingParams


def parser() -> Parser:
    return make_parser(str(embedded.path()))


def run(options: argparse.Namespace, out: TextIO) -> None:
    """Everything that can be checked is checked before the model is loaded. `out` gets what the user is to see."""
    quieten()
    config, params = engine_config(options), sampling_params(options)
    prompts = on_every_rank(lambda: prompts_of(options), config.timeout_s)
    printer = pick_printer(out, prompts, params.n, json=options.json, stream=options.stream)
    with LLM(**vars(config)) as llm:
        outputs = complete(llm, prompts, params, options.chat, printer)
        setup = setup_of(llm, (config.overlap,))
        run = Run(setup, prompts, outputs, figures(outputs), llm.overlap_summary(), count_woven(llm.spans))
    printer.finish(run)


def prompts_of(options: argparse.Namespace) -> list[str]:
    is_embedded = Path(options.model) == embedded.path()
    return read_prompts(options.prompts, options.prompts_file, is_embedded, sys.stdin)


def complete(llm: LLM, prompts: list[str], params: SamplingParams, chat: bool, printer: Printer) -> list[RequestOutput]:
    """Generate, and hand the printer every piece on the way, if it wants them."""
    if chat:
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        outputs = llm.chat(messages, params, stream=printer.streams)
    else:
        outputs = llm.generate(prompts, params, stream=printer.streams)
    return outputs if isinstance(outputs, list) else gather(outputs, printer)


def gather(stream: Iterator[RequestOutput], printer: Printer) -> list[RequestOutput]:
    """The last output of each request, in order."""
    last: dict[int, RequestOutput] = {}
    for output in stream:
        index = int(output.request_id)  # the first call of an engine numbers its requests from 0
        last[index] = output
        printer.update(index, output)
    return [last[index] for index in sorted(last)]


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """Raises ValueError for what cannot be."""
    fields: dict[str, Any] = chosen(options, (*MODEL, *ENGINE, *OUTPUT))
    fields["progress"] = options.progress and sys.stderr.isatty()
    return EngineConfig(model=options.model, link=link(options), **fields)


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """Raises ValueError for what cannot be."""
    return SamplingParams(**chosen(options, SAMPLING))


def quieten() -> None:
    """Libraries' errors only: TRANSFORMERS_VERBOSITY says otherwise. Warnings come from rank 0 alone."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.logging.set_verbosity_error()
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
