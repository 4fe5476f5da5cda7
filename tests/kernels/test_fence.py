"""The fence itself: it is where it should be."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from tests.kernels.fence import fenced

TOUCH = "import torch, ctypes; from tests.kernels.fence import fenced; x = fenced(torch.ones(3, 5)); "


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_holds_the_same(dtype):
    tensor = torch.arange(40, dtype=dtype).view(4, 10)[:, 2:7]
    copy = fenced(tensor)
    assert copy.equal(tensor)
    assert copy.stride() == tensor.stride()
    after_a_row = ctypes.string_at(copy.data_ptr() + 5 * tensor.element_size(), tensor.element_size())
    if dtype == torch.float32:
        assert torch.frombuffer(bytearray(after_a_row), dtype=dtype).isnan()


@pytest.mark.parametrize(("past", "dies"), [(-1, False), (0, True)])
def test_kills_who_reads_past_the_end(past, dies):
    code = f"{TOUCH} ctypes.string_at(x.data_ptr() + 4 * x.numel() + {past}, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (done.returncode < 0) == dies
