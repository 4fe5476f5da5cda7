"""What a step's sampling uploads: where the arrays lie in the one copy. The meta device knows places, not values."""

import numpy as np
import pytest
import torch

from tokenweave.engine.upload import upload

SHAPES = {"one": (1,), "three": (3,), "floats": (5,), "rows": (3, 3), "last": (2, 4)}
ARRAYS = {name: np.ones(shape, np.float32 if name == "floats" else np.int64) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_and_dtypes_stay(device):
    on = upload(ARRAYS, torch.device(device))
    assert {name: tuple(tensor.shape) for name, tensor in on.items()} == SHAPES
    assert [str(tensor.dtype) for tensor in on.values()] == ["torch." + str(array.dtype) for array in ARRAYS.values()]


def test_each_begins_at_a_multiple_of_16_bytes_behind_the_one_before():
    """Kernels load 16 bytes at a time where they can."""
    end = 0
    for tensor in upload(ARRAYS, torch.device("meta")).values():
        start = tensor.storage_offset() * tensor.element_size()
        assert start % 16 == 0
        assert start >= end
        end = start + tensor.nbytes
