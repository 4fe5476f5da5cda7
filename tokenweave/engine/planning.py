"""Opening a rank's planner: what is known of the model and of the machine at hand."""

from __future__ import annotations

import logging
from dataclasses import replace

from tokenweave.cost.cost import Cost
from tokenweave.cost.machine import calibrated, data_sheet, machine_name, with_link
from tokenweave.cost.planner import Planner
from tokenweave.cost.shape import shape_of_spec
from tokenweave.cost.tuned import Store, make_key
from tokenweave.engine.runner import Runner
from tokenweave.weave.plan import StepTimes

log = logging.getLogger(__name__)


def open_planner(runner: Runner, times: StepTimes | None) -> Planner:
    """The planner of a rank; of any but rank 0, which plans for all, one that knows nothing.

    Raises ValueError naming a calibration or a tuned plan that is broken.
    """
    config, ranks = runner.config, runner.ranks
    decides = config.overlap in ("auto", "weave") and ranks.world_size > 1 and ranks.rank == 0
    cost = cost_of(runner) if decides else None
    if cost is None:
        return Planner(config.overlap, times=times)
    key = make_key(cost.shape, cost.world_size, cost.hardware.name)
    tuned = Store().read(key) if config.overlap == "auto" else None  # goes before everything else
    if tuned is not None:
        log.info("plans go by what was tuned at %s rows", ", ".join(str(step.rows) for step in tuned.steps))
    return Planner(config.overlap, cost, times, tuned, config.max_num_batched_tokens)


def cost_of(runner: Runner) -> Cost | None:
    """The cost model of what runs: this machine as calibrated, or else by its data sheet, with the simulated link if
    there is one. None for a GPU that there is neither of."""
    ranks = runner.ranks
    hardware = calibrated(ranks.device) or data_sheet(ranks.device)
    if hardware is None:
        log.info("nothing is known of %s; `tokenweave calibrate` measures it", machine_name(ranks.device))
        return None
    if runner.config.link is not None:
        hardware = with_link(hardware, runner.config.link, ranks.world_size)
    if runner.communicator.choice.implementation != "multimem":
        hardware = replace(hardware, multicast=False)
    return Cost(shape_of_spec(runner.spec, str(runner.dtype).removeprefix("torch.")), hardware, ranks.world_size)
