"""Redraw: the same machine with its constants off by some factor each: how wrong the model may be."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np

from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import Efficiency, Hardware
from tokenweave.cost.ops import Numbers
from tokenweave.cost.shape import ModelShape

SPREAD = 0.3
EFFICIENCIES = ("gemm", "attention", "all_reduce", "memory", "grouped_gemm", "link", "ring_link")
CONSTANTS = (
    "kernel_s",
    "graph_kernel_s",
    "host_launch_s",
    "step_s",
    "collective_s",
    "ring_s",
    "sm_link_bandwidth",
    "fused_sm_link_bandwidth",
)


class RedrawnCost(Cost):
    """A Cost whose co-running is off as well: a collective takes `sms_factor` times its SMs from the GEMMs beside it,
    and `taken_factor` times its share of the memory's bandwidth."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        world_size: int,
        *,
        sms_factor: float,
        taken_factor: float,
        graph: bool,
    ):
        super().__init__(shape, hardware, world_size, graph=graph)
        self.sms_factor, self.taken_factor = sms_factor, taken_factor

    @property
    def taking(self) -> float:
        return self.taken_factor

    def left(self, sms: Numbers) -> Numbers:
        return super().left(np.round(self.sms_factor * sms))


def redraw_cost(cost: Cost, random: Random, spread: float = SPREAD) -> RedrawnCost:
    """`cost` with every constant of efficiency, tiles, link, launches and interference times a factor of its own,
    uniform within 1 - spread .. 1 + spread."""
    hardware = redraw_hardware(cost.hardware, random, spread)
    sms_factor, taken_factor = _factor(random, spread), _factor(random, spread)
    return RedrawnCost(
        cost.shape, hardware, cost.world_size, sms_factor=sms_factor, taken_factor=taken_factor, graph=cost.graph
    )


def redraw_hardware(hardware: Hardware, random: Random, spread: float = SPREAD) -> Hardware:
    efficiency = Efficiency(
        **{name: getattr(hardware.efficiency, name) * _factor(random, spread) for name in EFFICIENCIES}
    )
    tiles = tuple(replace(tile, efficiency=tile.efficiency * _factor(random, spread)) for tile in hardware.tiles)
    constants = {name: getattr(hardware, name) * _factor(random, spread) for name in CONSTANTS}
    return replace(hardware, efficiency=efficiency, tiles=tiles, **constants)


def _factor(random: Random, spread: float) -> float:
    return random.uniform(1.0 - spread, 1.0 + spread)
