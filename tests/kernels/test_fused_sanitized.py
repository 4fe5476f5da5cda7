"""The fused kernel as threads under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer.

The faults that they must see are in faults.py: the same runs, which here must be clean.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from tests.kernels.scenarios import RUNS, problem
from tests.kernels.twin import ADDRESS, THREAD, compile_twin, in_background, prefix, twin_folder

NAMES = ("two_shot", "one_shot", "multimem", "post_norm", "listed", "channels", "asked")
TIMES = {THREAD: 3, ADDRESS: 2}  # each run has another order of events
CASES = list(product(NAMES, TIMES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def programs(folder: Path) -> Iterator[list[Future[Path]]]:
    given = [(RUNS[name].scenario(), flags) for name, flags in CASES]
    jobs = (partial(compile_twin, each.variant, each.layout, folder, *flags) for each, flags in given)
    with in_background(jobs) as futures:
        yield futures


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{name}-{'thread' if flags is THREAD else 'address'}" for name, flags in CASES]
)
def test_sanitizers_find_nothing(number: int, programs: list[Future[Path]], folder: Path) -> None:
    name, flags = CASES[number]
    prefix(flags)  # skips the test where the sanitizer does not run
    programs[number].result()
    for _ in range(TIMES[flags]):
        assert problem(RUNS[name], folder, flags) is None
