"""Setup: what ran, and on what; what a person and a machine are told of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import tokenweave
from tokenweave.comm.choice import Choice
from tokenweave.config import EngineConfig
from tokenweave.cost.machine import machine_name
from tokenweave.engine.memory import Memory
from tokenweave.llm import LLM

Row = tuple[str, str]


@dataclass(frozen=True)
class Setup:
    """overlaps: the modes that ran. memory: of rank 0. plans: what they go by, as LLM.plans says. machine: by its
    GPU's or CPU's name."""

    config: EngineConfig
    overlaps: tuple[str, ...]
    world_size: int
    device: str
    comm: Choice
    memory: Memory
    plans: str
    machine: str

    def rows(self) -> Iterator[Row]:
        """(label, value) for a table."""
        yield "ranks", f"{self.world_size} on {self.device}, --overlap {','.join(self.overlaps)}"
        yield "memory", str(self.memory)
        if self.world_size > 1 and self.overlaps != ("off",):
            yield "sums", f"{self.comm.implementation}: {self.comm.reason}"
        if self.world_size > 1 and "auto" in self.overlaps:
            yield "plans", f"by {self.plans}"
        if self.config.link is not None:
            gbit_per_s = self.config.link.bandwidth_bytes_per_s * 8 / 1e9
            speed = f"{gbit_per_s:g} Gbit/s, {self.config.link.latency_s * 1e6:g} us"
            effect = "not used by one rank" if self.world_size == 1 else "all times here are those of a simulation"
            yield "simulated link", f"{speed}: {effect}"

    def record(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "model": self.config.model,
            "world_size": self.world_size,
            "device": self.device,
            "machine": self.machine,
            "versions": {"tokenweave": tokenweave.__version__, "torch": torch.__version__},
            "comm": asdict(self.comm),
            "plans": self.plans,
            "memory": asdict(self.memory),
            "simulated_link": None if self.config.link is None else asdict(self.config.link),
        }


def setup_of(llm: LLM, overlaps: tuple[str, ...]) -> Setup:
    machine = machine_name(llm.device)
    return Setup(llm.config, overlaps, llm.world_size, llm.device.type, llm.comm, llm.memory, llm.plans, machine)
