"""What rank 0 tells the others besides steps: outputs as they come, and the end of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenweave.comm.group import Ranks
from tokenweave.engine.runner import Runner
from tokenweave.outputs import RequestOutput


@dataclass(frozen=True)
class Accepted:
    """A call's requests are in order; work begins."""


@dataclass(frozen=True)
class Emit:
    """Outputs of a streamed call: everything so far of the requests that got tokens."""

    outputs: list[RequestOutput]


@dataclass(frozen=True)
class Done:
    """The call is over. error: it was refused, and every rank raises this."""

    outputs: list[RequestOutput]
    error: Exception | None = None


Message = Accepted | Emit | Done


def finish_call(message: Any, runner: Runner, ranks: Ranks) -> bool:
    """True if `message` ends the call; the ranks then bring their timelines together, where they keep any."""
    if not isinstance(message, Done):
        return False
    collect_spans(runner, ranks)
    return True


def collect_spans(runner: Runner, ranks: Ranks) -> list[Any]:
    """Every rank's spans since the start, on every rank. Collective."""
    if runner.recorder is None:
        return []
    runner.synchronize()  # a GPU's times are known when its work is done
    return [span for spans in ranks.gather(runner.recorder.export()) for span in spans]
