"""At hand: what is known of a runner's model on this machine: its cost model, and its tuned plans."""

from __future__ import annotations

from dataclasses import replace

from tokenweave.cost.cost import Cost
from tokenweave.cost.machine import hardware_at_hand, hardware_key, with_link
from tokenweave.cost.shape import ModelShape, shape_of_spec
from tokenweave.cost.tuned import Key, Store, Tuned, make_key
from tokenweave.engine.runner import Runner


def cost_of(runner: Runner) -> Cost:
    """The cost model of what this runner does: the machine as calibrated, or by data sheet, with the simulated link.

    Raises ValueError for a broken calibration, by name, and for a GPU that nothing is known of.
    """
    ranks, link = runner.ranks, runner.config.link
    hardware = hardware_at_hand(ranks.device)
    hardware = hardware if link is None else with_link(hardware, link, ranks.world_size)
    if runner.communicator.choice.implementation != "multimem":
        hardware = replace(hardware, multicast=False)
    return Cost(shape_of(runner), hardware, ranks.world_size)


def tuned_plans(runner: Runner, store: Store | None = None) -> Tuned | None:
    """What `tokenweave tune` has found for this model, W and machine; None: nothing.

    Raises ValueError naming a broken file.
    """
    return (store or Store()).read(key_of(runner))


def key_of(runner: Runner) -> Key:
    return make_key(shape_of(runner), runner.ranks.world_size, hardware_key(runner.ranks.device, runner.config.link))


def shape_of(runner: Runner) -> ModelShape:
    return shape_of_spec(runner.spec, str(runner.dtype).removeprefix("torch."))
