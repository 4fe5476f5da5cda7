"""How many SMs torch's GEMMs are told that they have: beside a sum, those that it leaves.

Many of cuBLAS's kernels for Hopper launch as many blocks as the GPU has SMs, and give each its share of the tiles.
Where a sum holds four SMs, four blocks run when all others are done: the GEMM takes up to twice as long. Told how many
SMs are left, cuBLAS may launch so many; it may also take that as a hint alone. So whether it helps is measured
(cost/measure.py).

Nothing else is told: our Triton kernels have a block for each tile, and a GPU gives out blocks as its SMs get free.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ALL = 0  # cuBLAS's default


@contextmanager
def leave_free(sms: int, device: torch.device, biases: bool = False) -> Iterator[None]:
    """Inside, the GEMMs that this thread queues on `device`, its current one, are told to leave `sms` SMs free; before
    and after, none. A CUDA graph keeps what it was captured with. Does nothing for 0 SMs, and on a CPU.

    biases: whether any GEMM adds one. In torch 2.11 such a GEMM goes through cuBLASLt, which heeds torch's carve-out
    alone, and all others through cuBLAS, which heeds its handle's target alone. torch warns once of a carve-out.
    Raises RuntimeError for more SMs than there are.
    """
    if sms == 0 or device.type != "cuda":
        yield
        return
    handle = torch.cuda.current_blas_handle()  # torch's in this thread, whatever the stream
    try:
        set_target(handle, torch.cuda.get_device_properties(device).multi_processor_count - sms)
        if biases:
            torch._C._set_sm_carveout_experimental(sms)
        yield
    finally:
        if biases:
            torch._C._set_sm_carveout_experimental(None)
        set_target(handle, ALL)


def set_target(handle: int, sms: int) -> None:
    status = library().cublasSetSmCountTarget(ctypes.c_void_p(handle), ctypes.c_int(sms))
    if status != 0:
        raise RuntimeError(f"cuBLAS cannot be told of {sms} SMs (status {status}): give the sums fewer")


@functools.cache
def library() -> Any:
    """torch's CUDA library, which has the symbols of the cuBLAS that it is linked to. Raises OSError without it."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))


def why_not() -> str:
    """Why GEMMs cannot be told; "": they can."""
    try:
        library().cublasSetSmCountTarget  # noqa: B018
    except (OSError, AttributeError) as error:
        return f"torch's cuBLAS is not to be found: {error}"
    return ""
