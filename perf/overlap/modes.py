"""Modes: ways to run the same step. What each is made of: how the batch is overlapped, and what carries the bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from perf.overlap.figures import BEFORE_BASELINE, COMMUNICATION, SLEEPS
from perf.overlap.noting import note_requests
from perf.overlap.peers import Opened
from perf.overlap.points import Setting
from perf.overlap.silent import SilentTransport, note
from perf.shapes import VOCAB_SIZE, prompt
from tokenweave.comm.communicator import Communicator
from tokenweave.comm.link import Link, PacedTransport
from tokenweave.cost.planner import Planner
from tokenweave.engine.batch import Batch
from tokenweave.engine.rank import Rank
from tokenweave.weave.plan import Plan


@dataclass(frozen=True)
class Mode:
    """overlap: as EngineConfig's. wire: "link", "silent" (sends nothing) or "sleeps" (a paced link, nothing sent).
    baseline: what forms the sums, by its name; "": the runtime."""

    overlap: str
    wire: str = "link"
    baseline: str = ""


MODES = {
    "off": Mode("off"),
    "fused": Mode("fused"),
    "weave": Mode("weave"),
    "auto": Mode("auto"),
    "nocomm": Mode("off", "silent"),
}
CONTROLS = {f"{name}{SLEEPS}": Mode(name, "sleeps") for name in ("off", "weave")}


@dataclass(frozen=True)
class Bench:
    """An open rank, the wires that a mode may be run on, and the baselines and peers that could be opened.

    missing: why the others could not.
    """

    rank: Rank
    setting: Setting
    wires: dict[str, Any]
    own: Communicator  # the runtime's
    baselines: dict[str, Communicator]
    peers: dict[str, Opened]
    missing: dict[str, str]

    @property
    def vocab_size(self) -> int:
        """Of prompts."""
        return min(VOCAB_SIZE, self.rank.runner.spec.vocab_size)

    def prompt(self, tokens: int) -> list[int]:
        return prompt(tokens, vocab_size=self.vocab_size)

    @property
    def modes(self) -> dict[str, Mode]:
        """All that a step is timed in."""
        return MODES | self.offs | (CONTROLS if "sleeps" in self.wires else {})

    @property
    def offs(self) -> dict[str, Mode]:
        """`off` over each baseline."""
        return {f"{BEFORE_BASELINE}{name}": replace(MODES["off"], baseline=name) for name in self.baselines}

    def planner(self, mode: Mode) -> Planner:
        """As an LLM of that `overlap` would have it, by what was measured on the link."""
        return self.rank.planner.under(mode.overlap)

    def plan(self, mode: Mode, batch: Batch) -> Plan:
        """Rank 0's plan, on every rank. Collective."""
        ranks = self.rank.ranks
        return ranks.gather(self.planner(mode).plan(batch.spans) if ranks.rank == 0 else None)[0]

    def step(self, mode: Mode, batch: Batch, plan: Plan) -> None:
        """One forward pass in that mode, to its end."""
        self.put_on(mode)
        self.rank.runner.forward(batch, plan)
        self.rank.runner.synchronize()

    def put_on(self, mode: Mode) -> None:
        runner = self.rank.runner
        runner.communicator = self.baselines[mode.baseline] if mode.baseline else self.own
        runner.communicator.transport = self.wires[mode.wire]

    def communication_alone(self, batch: Batch) -> dict[str, Callable[[], Any]]:
        """The contestant that sends what a step in mode "fused" sends, and computes nothing else; none without a wire.

        On CUDA it is that step's sums and norms, since one kernel may form both.
        """
        ranks, runner = self.rank.ranks, self.rank.runner
        if ranks.world_size == 1:
            return {}
        plan = self.plan(MODES["fused"], batch)
        self.put_on(MODES["fused"])
        if ranks.device.type == "cuda":
            return {COMMUNICATION: note_requests(runner, lambda: runner.forward(batch, plan))}

        def run(noting: Any) -> None:
            self.own.transport = noting
            runner.forward(batch, plan)

        return {COMMUNICATION: partial(note(ranks.rank, ranks.world_size, run), self.wires["link"])}


def wires(rank: Rank, setting: Setting) -> dict[str, Any]:
    """What can carry the bytes. `link` is the transport that the rank opened, paced or not."""
    silent = SilentTransport(rank.ranks.rank, rank.ranks.world_size)
    own = {"link": rank.runner.communicator.transport, "silent": silent}
    pace = link(setting)
    return own if pace is None else own | {"sleeps": PacedTransport(silent, pace)}


def link(setting: Setting) -> Link | None:
    """The simulated wire, where the setting asks for one."""
    return Link(setting.mbit_per_s * 1e6 / 8) if setting.link == "paced" else None


def mode_of(plan: Plan) -> str:
    """What `auto` chose."""
    if plan.cut is not None:
        return "weave"
    return "off" if plan.form == "reference" else "fused"
