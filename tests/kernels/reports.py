"""What ranks must report when they give up on each other."""

from __future__ import annotations

from tests.kernels.twin import Outcome, Scenario, wrong_numbers
from tokenweave.kernels.fused import REASONS, Report


def of_dead_rank(scenario: Scenario, outcome: Outcome) -> str | None:
    """What is wrong with the others' reports of a rank that stays away from a launch, or None."""
    return misreports(scenario, outcome, 2 * scenario.dead_from + 1) or wrong_numbers(
        scenario, outcome, scenario.dead_from
    )


def of_asked_rank(scenario: Scenario, outcome: Outcome) -> str | None:
    """The same, where the host of `asked_rank` had it give up: it says so, and the others that it told them."""
    teller, dead = scenario.asked_rank, scenario.dead_rank
    for rank, report in enumerate(outcome.reports):
        if rank not in (teller, dead) and (reason(report), report.seen) != ("aborted", 4 << 32 | teller << 16 | dead):
            return f"rank {rank} reports {reason(report)}, {report.seen:#x}"
    return misreports(scenario, outcome, 2 * scenario.dead_from + 1, "asked") or wrong_numbers(
        scenario, outcome, scenario.dead_from
    )


def misreports(scenario: Scenario, outcome: Outcome, epoch: int, why: str = "timeout") -> str | None:
    """What is wrong with the others' reports of a dead rank, which was last seen in the epoch before `epoch`."""
    if outcome.returncode:
        return f"exit code {outcome.returncode}: {outcome.stderr[-2000:]}"
    others = [rank for rank in range(scenario.variant.world_size) if rank != scenario.dead_rank]
    tellers = [rank for rank in others if reason(outcome.reports[rank]) == why]
    if not tellers:
        return f"no rank reports that it gave up: {why}"
    for rank in others:
        if what := misreport(scenario, outcome.reports[rank], rank, tellers, epoch):
            return f"rank {rank} reports {what}"
        if {len(channel[rank]) for channel in outcome.hidden} != {scenario.launches}:
            return f"rank {rank} did not come back from all launches"
    return None


def misreport(scenario: Scenario, report: Report, rank: int, tellers: list[int], epoch: int) -> str | None:
    if report.rank != rank or report.peer != scenario.dead_rank:
        return f"that rank {report.rank} gave up on rank {report.peer}"
    if report.channel >= scenario.channels or report.block >= max(map(max, scenario.blocks)):
        return f"channel {report.channel}, block {report.block}"
    if reason(report) == "aborted":
        return None if report.told_by in tellers and report.told_by != rank else f"told by rank {report.told_by}"
    if rank not in tellers or report.told_by != rank:
        return f"{reason(report)}, told by rank {report.told_by}"
    if report.expected != signal(scenario, rank, epoch) or report.seen != signal(scenario, rank, epoch - 1):
        return f"{report.seen:#x}, expected {report.expected:#x}"
    return None


def of_mismatch(scenario: Scenario, outcome: Outcome) -> str | None:
    """What is wrong with the reports of ranks that did not launch the same in the first launch, or None."""
    if outcome.returncode:
        return f"exit code {outcome.returncode}: {outcome.stderr[-2000:]}"
    tellers = [report.rank for report in outcome.reports if reason(report) == "mismatch"]
    for rank, report in enumerate(outcome.reports):
        if reason(report) == "aborted" and report.told_by in tellers and report.told_by != rank:
            continue
        words = signal(scenario, rank, 1), signal(scenario, report.peer, 1)
        if reason(report) != "mismatch" or report.rank != rank or (report.expected, report.seen) != words:
            return f"rank {rank} reports {reason(report)}: {report.seen:#x}, expected {report.expected:#x}"
        if report.expected == report.seen:
            return f"rank {rank} reports a mismatch with rank {report.peer}, which launched the same"
    return None


def reason(report: Report) -> str:
    return REASONS.get(report.reason, "nothing")


def signal(scenario: Scenario, rank: int, epoch: int) -> int:
    """What `rank` signals in this epoch of the first kind of launch; 0 before the first one."""
    return epoch << 32 | scenario.claimed_rows[rank] << 12 | scenario.blocks[0][rank] if epoch else 0
