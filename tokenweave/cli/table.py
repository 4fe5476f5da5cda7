"""Table: a run's figures for a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenweave.cli.cells import duration
from tokenweave.cli.figures import TIMES, Run
from tokenweave.cli.setup import Row
from tokenweave.trace.overlap import Overlap

LABEL_WIDTH = 17


def table(run: Run) -> str:
    """The lines of the summary, each with its newline."""
    return lines([*of_tokens(run), *run.setup.rows(), *of_communication(run)]) + TIMES + "\n"


def lines(rows: Iterable[Row]) -> str:
    return "".join(f"{label:<{LABEL_WIDTH}}{value}\n" for label, value in rows)


def of_tokens(run: Run) -> Iterator[Row]:
    figures = run.figures
    cached = f", {figures.cached_tokens} of them cached" if figures.cached_tokens else ""
    yield "prompts", f"{figures.prompts} ({figures.prompt_tokens} tokens{cached})"
    rate = f"{figures.tokens_per_s:.1f} tokens/s"
    yield "generated", f"{figures.generated_tokens} tokens in {duration(figures.seconds)}: {rate}, prefill included"
    yield "TTFT", f"mean {duration(figures.ttft_mean_s)}, max {duration(figures.ttft_max_s)}"
    yield "completions", f"{figures.stopped} ended, {figures.cut_short} cut off by --max-tokens or the model's length"
    if figures.preemptions:
        yield "preemptions", f"{figures.preemptions}, for lack of KV blocks (--num-kv-blocks)"


def of_communication(run: Run) -> Iterator[Row]:
    if run.overlap is None or run.no_overlap is not None:
        yield "communication", run.no_overlap or ""
    else:
        yield "communication", f"{shares(run.overlap)}; mean of ranks, waits for late ranks included"
        for phase, overlap in sorted(run.overlap.by_phase.items(), reverse=True):
            if phase and overlap.hidden_share is not None:
                yield f"  {phase}", shares(overlap)
        yield "woven", "{} of {} steps".format(*run.woven)
    if run.setup.config.trace is not None:
        path = Path(run.setup.config.trace)
        yield "timeline", f"{path} (open in ui.perfetto.dev), {path.with_suffix('.png')}"


def shares(overlap: Overlap) -> str:
    share = 100 * (overlap.hidden_share or 0.0)
    hidden, exposed = duration(overlap.hidden_s), duration(overlap.exposed_s)
    return f"{share:.0f} % hidden: {hidden} of {duration(overlap.communication_s)}, {exposed} exposed"
