"""What the tests of kernels/ share: skips where NVRTC is missing, a kernel cache of their own, Triton's interpreter."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.interpreter import call
from tests.ranks import RankPool
from tokenweave.kernels.compiler import CompilerMissing, nvrtc_version


@pytest.fixture
def nvrtc() -> tuple[int, int]:
    """The version of NVRTC; skips the test where there is none."""
    try:
        return nvrtc_version()
    except CompilerMissing as error:
        pytest.skip(str(error))


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that this test's cubins are kept in, empty."""
    monkeypatch.setenv("TOKENWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """interpreted(fn, *args): fn's result from a process of its own, where Triton's kernels are interpreted and so
    take CPU tensors. fn is a module's function, sent by name; that module must not import Triton at its top.

    What the interpreter is good for: fp32 (it truncates where it casts to bf16) and tiny shapes. Programs run one
    after another, so that it finds no race.
    """
    pytest.importorskip("triton")
    pool = RankPool(1)

    def run(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:  # read when Triton is imported, and the pool may start anew
            patch.setenv("TRITON_INTERPRET", "1")
            return pool.run(call, fn, *args, **kwargs)[0]

    yield run
    pool.close()
