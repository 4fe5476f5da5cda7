"""At hand: what is known of a runner's model on this machine: its cost model, and its tuned plans."""

from __future__ import annotations

from dataclasses import replace

from tokenweave.cost.cost import Cost
from tokenweave.cost.host_bound import GRAIN, host_bound_tokens
from tokenweave.cost.machine import calibrated, data_sheet, hardware_at_hand, hardware_key, with_link
from tokenweave.cost.shape import ModelShape, shape_of_spec
from tokenweave.cost.tuned import Key, Store, Tuned, make_key
from tokenweave.engine.runner import Runner


def cost_of(runner: Runner, graph: bool = False) -> Cost:
    """The cost model of what this runner does: the machine as calibrated, or by data sheet, with the simulated link.

    graph: of steps that run as CUDA graphs.
    Raises ValueError for a broken calibration, by name, and for a GPU that nothing is known of.
    """
    ranks, link = runner.ranks, runner.config.link
    hardware = hardware_at_hand(ranks.device)
    hardware = hardware if link is None else with_link(hardware, link, ranks.world_size)
    if runner.communicator.choice.implementation != "multimem":
        hardware = replace(hardware, multicast=False)
    return Cost(shape_of(runner), hardware, ranks.world_size, graph=graph)


def graph_tokens(runner: Runner) -> int:
    """Tokens of the largest prefill that is captured: what was asked for, else as long as the step is predicted to wait
    for the host. Collective: rank 0's prediction is everyone's. Raises ValueError for a broken calibration, by name."""
    config, ranks = runner.config, runner.ranks
    if config.cuda_graph_max_tokens is not None or runner.capturer is None:
        return runner.graph_tokens
    with ranks.together("reading what is known of this machine"):
        tokens = runner.graph_tokens
        if calibrated(ranks.device) is not None or data_sheet(ranks.device) is not None:
            woven = ranks.world_size > 1 and config.overlap in ("auto", "weave")
            tokens = max(GRAIN, host_bound_tokens(cost_of(runner), woven, config.max_num_batched_tokens))
    return ranks.gather(tokens)[0]


def tuned_plans(runner: Runner, store: Store | None = None) -> Tuned | None:
    """What `tokenweave tune` has found for this model, W and machine; None: nothing.

    Raises ValueError naming a broken file.
    """
    return (store or Store()).read(key_of(runner))


def key_of(runner: Runner) -> Key:
    return make_key(shape_of(runner), runner.ranks.world_size, hardware_key(runner.ranks.device, runner.config.link))


def shape_of(runner: Runner) -> ModelShape:
    return shape_of_spec(runner.spec, str(runner.dtype).removeprefix("torch."))
