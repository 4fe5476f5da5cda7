"""Ranks that stay away, come late or launch something else: the others come back, and say whom they waited for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.kernels import reports
from tests.kernels.faults import KERNEL, PLAIN, Fault
from tests.kernels.scenarios import MANY, RUNS, Run, problem, small
from tests.kernels.twin import Outcome, Scenario, twin_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin_folder(tmp_path_factory)


@pytest.mark.parametrize("name", ["dead", "dead later", "asked", "asked later", "odd blocks", "odd rows"])
def test_the_others_say_who_stayed_away_and_every_later_launch_returns_at_once(name: str, folder: Path) -> None:
    assert problem(RUNS[name], folder) is None


@pytest.mark.parametrize("sum_by", ["one_shot", "multimem"])
def test_a_dead_rank_is_reported_whatever_the_sum(sum_by: str, folder: Path) -> None:
    run = replace(RUNS["dead"], scenario=lambda: small(MANY, sum_by, dead_rank=3, timeout_ms=2000))
    assert problem(run, folder) is None


def test_a_dead_rank_ends_the_launches_of_all_channels(folder: Path) -> None:
    run = replace(RUNS["dead"], scenario=lambda: small(MANY, channels=2, dead_rank=1, timeout_ms=2000))
    assert problem(run, folder) is None


def test_a_rank_that_dies_within_a_launch_is_reported(folder: Path, tmp_path: Path) -> None:
    dies = Fault("", KERNEL, "  meeting.leave();\n", "  if (rank != 1) meeting.leave();\n", "dead", PLAIN)
    run = Run(lambda: small([[2]], dead_rank=1, dead_from=1, timeout_ms=2000), partial(reports.misreports, epoch=2), 30)
    assert problem(run, folder, source=dies.plant(tmp_path / "csrc")) is None


def test_a_rank_that_is_late_but_not_too_late_is_waited_for(folder: Path) -> None:
    assert problem(Run(lambda: small([[2], [1]], dead_rank=1, dead_from=2, absent_ms=300)), folder) is None


def test_a_rank_that_comes_too_late_is_told(folder: Path) -> None:
    def too_late(scenario: Scenario, outcome: Outcome) -> str | None:
        told = outcome.reports[1]
        if reports.reason(told) != "aborted" or told.rank != 1 or told.peer != 1 or told.told_by == 1:
            return f"the late rank reports {reports.reason(told)}, told by rank {told.told_by}"
        return reports.misreports(scenario, outcome, 1)

    run = Run(lambda: small([[2]], dead_rank=1, dead_from=1, absent_ms=4000, timeout_ms=2000), too_late, 30)
    assert problem(run, folder) is None
