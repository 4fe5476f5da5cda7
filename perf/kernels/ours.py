"""Our implementations of the sum, opened on this rank: the kernel over symmetric memory, and the plain forms."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perf.kernels.problem import Problem
from tokenweave.comm.choice import Choice, facts_of, no_multimem, no_peer
from tokenweave.comm.communicator import Channel, Communicator
from tokenweave.comm.fused import FusedCommunicator, Kernels, Wiring
from tokenweave.comm.group import Ranks
from tokenweave.comm.transport import CollectiveTransport, GlooTransport, Transport
from tokenweave.engine.communication import open_fused
from tokenweave.kernels.fused import Geometry, Launch, Variant
from tokenweave.weave.lanes import InlineLane

MULTIMEM, TWO_SHOT, ONE_SHOT = "multimem", "peer two-shot", "peer one-shot"
KERNELS = (MULTIMEM, TWO_SHOT, ONE_SHOT)
ONE_SHOT_ROWS = 1024  # it sums all rows on every rank, and is for few
SITE = "perf"


class Watched:
    """Kernels that remember how many blocks the last launch had: never more than there are rows for."""

    def __init__(self, kernels: Kernels):
        self.kernels = kernels
        self.blocks = 0

    def geometry(self, variant: Variant) -> Geometry:
        return self.kernels.geometry(variant)

    def launch(self, variant: Variant, launch: Launch, num_sms: int) -> None:
        self.blocks = num_sms
        self.kernels.launch(variant, launch, num_sms)


@dataclass(frozen=True)
class Ours:
    """One implementation. most_rows: for which it is meant. kernels: None where it is not the kernel."""

    name: str
    communicator: Communicator
    form: str  # of a channel: "fused" | "sharded" | "reference"
    most_rows: int
    kernels: Watched | None = None

    def open(self, rows: int, num_sms: int) -> Channel:
        return self.communicator.open(rows, 0, InlineLane(), self.form, {SITE: num_sms})


@dataclass(frozen=True)
class Opened:
    """Implementations that this group can use, and why it cannot use the others."""

    usable: list[Ours]
    missing: dict[str, str]


def open_ours(ranks: Ranks, problem: Problem, twins_folder: Path | None) -> Opened:
    """Collective. twins_folder: on CPU ranks, where the kernel's host twins are compiled. ValueError: no kernel."""
    opened = on_gpus(ranks, problem) if twins_folder is None else on_cpus(ranks, problem, twins_folder)
    transport = plain_transport(ranks)
    arguments = (transport, ranks.rank, problem.max_rows, problem.hidden_size, problem.dtype, problem.device)
    plain = [Ours(form, Communicator(*arguments), form, problem.max_rows) for form in ("sharded", "reference")]
    return Opened([*opened.usable, *plain], opened.missing)


def plain_transport(ranks: Ranks) -> Transport:
    kind = CollectiveTransport if ranks.device.type == "cuda" else GlooTransport
    return kind(ranks.rank, ranks.world_size, ranks.comm)


def on_gpus(ranks: Ranks, problem: Problem) -> Opened:
    facts = ranks.gather(facts_of(ranks.device))
    if obstacle := no_peer(facts, problem.dtype, problem.hidden_size):
        raise ValueError(f"the fused kernel cannot run on these ranks: {obstacle}; --dry-run needs no GPU")
    no_switch = no_multimem(facts, problem.dtype, problem.hidden_size)
    transport = plain_transport(ranks)
    hoped = Choice("peer" if no_switch else "multimem", "")
    communicator, choice = open_fused("auto", hoped, facts, ranks, transport, problem.layout)
    if choice.implementation == "peer" and not no_switch:
        no_switch = choice.reason  # the GPUs can, but this machine gives no address; it is listed as missing
    wiring = communicator.wiring
    usable = [over(name, transport, wiring) for name in KERNELS if name != MULTIMEM or not no_switch]
    return Opened(usable, {MULTIMEM: no_switch} if no_switch else {})


def on_cpus(ranks: Ranks, problem: Problem, folder: Path) -> Opened:
    if shutil.which("g++") is None:
        return Opened([], dict.fromkeys(KERNELS, "its host twin needs g++"))
    twins: Any = importlib.import_module("tests.comm.twins")  # by name: mypy leaves the tests out
    twin = twins.open_twin("multimem", folder, problem.layout)  # its memory serves all three, as on GPUs
    return Opened([over(name, twin.transport, twin.wiring) for name in KERNELS], {})


def over(name: str, transport: Transport, wiring: Wiring) -> Ours:
    """The implementation called `name` over memory that others may use too: sums of one lane never overlap."""
    watched = Watched(wiring.kernels)
    most = ONE_SHOT_ROWS if name == ONE_SHOT else wiring.layout.max_rows
    wiring = replace(
        wiring,
        sum="multimem" if name == MULTIMEM else "peer",
        one_shot_rows=most if name == ONE_SHOT else 0,
        kernels=watched,
    )
    return Ours(name, FusedCommunicator(transport, wiring), "fused", most, watched)


def headline(opened: Opened, world_size: int) -> Ours:
    """The implementation that figures and verdict are about: what comm="auto" takes for many rows."""
    by_name = {ours.name: ours for ours in opened.usable}
    return next(by_name[name] for name in preference(world_size) if name in by_name)


def preference(world_size: int) -> Iterator[str]:
    yield from (TWO_SHOT, MULTIMEM) if world_size == 2 else (MULTIMEM, TWO_SHOT)
    yield "sharded"
