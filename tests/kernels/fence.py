"""Tensors that end at a fence: who reads or writes past the end dies, where otherwise nobody might notice."""

from __future__ import annotations

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the same strides. Its last element is the last before memory that kills whoever touches it; what lies
    between its elements is NaN, if it is made of floats. For a process that may die, such as the interpreter's.
    """
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    span_bytes = span * tensor.element_size()
    pages = -(-span_bytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    fence = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * PAGE)
    if ctypes.CDLL(None, use_errno=True).mprotect(fence, ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect did not take the fence")
    line = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=pages * PAGE - span_bytes)
    if tensor.is_floating_point():
        line.fill_(torch.nan)
    return line.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
