"""Opening a rank's planner: what is known of the model and of the machine at hand."""

from __future__ import annotations

import logging

from tokenweave.cost.machine import calibrated, data_sheet, machine_name
from tokenweave.cost.planner import Planner
from tokenweave.engine.at_hand import cost_of, tuned_plans
from tokenweave.engine.runner import Runner
from tokenweave.weave.plan import StepTimes

log = logging.getLogger(__name__)


def open_planner(runner: Runner, times: StepTimes | None, carve_out: bool) -> Planner:
    """The planner of a rank; of any but rank 0, which plans for all, one that knows nothing. Collective.

    Raises ValueError naming a calibration or a tuned plan that is broken.
    """
    config, ranks, captures = runner.config, runner.ranks, runner.graphs is not None
    decides = config.overlap in ("auto", "weave") and ranks.world_size > 1 and ranks.rank == 0
    if not decides:
        return Planner(config.overlap, times=times)
    if calibrated(ranks.device) is None and data_sheet(ranks.device) is None:
        log.info("nothing is known of %s; `tokenweave calibrate` measures it", machine_name(ranks.device))
        return Planner(config.overlap, times=times, carve_out=carve_out)
    tuned = tuned_plans(runner) if config.overlap == "auto" else None  # goes before everything else
    captured = cost_of(runner, graph=True) if captures else None
    known = (config.max_num_batched_tokens, carve_out, captured, runner.graph_tokens)
    planner = Planner(config.overlap, cost_of(runner), times, tuned, *known)
    log.info("plans go by %s", planner.basis)
    return planner
