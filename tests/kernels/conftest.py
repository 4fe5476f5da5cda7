"""What the tests of kernels/ share: a skip where NVRTC is missing, and a kernel cache of their own."""

from pathlib import Path

import pytest

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
