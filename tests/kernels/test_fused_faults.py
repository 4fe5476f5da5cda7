"""Every fault planted in the fused kernel must be seen by what its own tests look at.

The same runs without a fault: test_fused_numerics, test_fused_sanitized, test_fused_dead_peer, and here.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

from tests.kernels.faults import FAULTS, Fault
from tests.kernels.scenarios import RUNS, problem
from tests.kernels.twin import compile_twin, in_background, prefix, twin_folder

ATTEMPTS = 10  # which thread comes first is luck


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def planted(folder: Path) -> Iterator[list[Future[Path]]]:
    """The headers with each of the faults, compiled."""
    (folder / "planted").mkdir(exist_ok=True)
    with in_background(partial(plant, fault, folder, number) for number, fault in enumerate(FAULTS)) as futures:
        yield futures


def plant(fault: Fault, folder: Path, number: int) -> Path:
    source = fault.plant(folder / "planted" / str(number))
    scenario = RUNS[fault.scenario].scenario()
    compile_twin(scenario.variant, scenario.layout, folder, *fault.flags, source=source)
    return source


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """How each fault was seen; printed at the end."""
    lines: dict[str, str] = {}
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nfault, and how it was seen:")
        for name, how in lines.items():
            print(f"  {name:55} {how}")


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_fault_is_seen(number: int, planted: list[Future[Path]], folder: Path, seen: dict[str, str]) -> None:
    fault = FAULTS[number]
    prefix(fault.flags)  # skips the test where the sanitizer does not run
    source = planted[number].result()
    for attempt in range(1, ATTEMPTS + 1):
        found = problem(RUNS[fault.scenario], folder, fault.flags, source)
        if found:
            seen[fault.name] = f"{fault.scenario}, run {attempt}: {headline(found)}"
            return
    pytest.fail(f"nobody sees that {fault.name}, in {ATTEMPTS} runs of {fault.scenario} with {fault.flags}")


@pytest.mark.parametrize("name", ["impatient", "dead, hurried", "asked, hurried", "odd blocks, hurried"])
def test_nothing_is_seen_where_there_is_no_fault(name: str, folder: Path) -> None:
    assert problem(RUNS[name], folder) is None


def headline(found: str) -> str:
    """The line that says what a sanitizer has found, or the first one."""
    lines = [line for line in found.splitlines() if line.strip("=")]
    line = next((line for line in lines if line.startswith("SUMMARY")), lines[0])
    return " ".join(Path(word).name if word.startswith("/") else word for word in line.split())[:110]
