"""Every fault planted in the fused kernel must be seen by what its own tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.faults import FAULTS, Fault
from tests.kernels.scenarios import RUNS, problem
from tests.kernels.twin import twin_folder

ATTEMPTS = 10  # which thread comes first is luck


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """How each fault was seen; printed at the end."""
    lines: dict[str, str] = {}
    yield lines
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    for name, how in lines.items():
        reporter.write_line(f"  {name:55} {how}")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fault_is_seen(fault: Fault, folder: Path, tmp_path: Path, seen: dict[str, str]) -> None:
    source = fault.plant(tmp_path / "csrc")
    for attempt in range(1, ATTEMPTS + 1):
        found = problem(RUNS[fault.scenario], folder, fault.flags, source)
        if found:
            seen[fault.name] = f"{fault.scenario}, attempt {attempt}: {headline(found)}"
            return
    pytest.fail(f"nobody sees that {fault.name}, in {ATTEMPTS} runs of {fault.scenario} with {fault.flags}")


def headline(found: str) -> str:
    """The line that says what a sanitizer has found, or the first one."""
    lines = [line for line in found.splitlines() if line.strip("=")]
    return next((line for line in lines if line.startswith("SUMMARY")), lines[0])[:150]
