"""act(gate) * up in one Triton kernel."""

import triton
import triton.language as tl
from torch import Tensor

from tokenweave.kernels.activation import activate

BLOCK = 1024  # columns of a program: 8 for each of 128 threads, 16 bytes in bf16


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """act(gate) * up, rounded after each of the two as torch does.

        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    gate_up: [rows, 2 * width], of stride 1 in a row. kind: one of activation.KINDS' values. Returns [rows, width].
    """
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, BLOCK))
    gated_kernel[grid](gate_up, out, gate_up.stride(0), width, kind, BLOCK, num_warps=4, enable_fp_fusion=True)
    return out


@triton.jit
def gated_kernel(gate_up, out, row_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * row_stride + column, mask=inside)
    up = tl.load(gate_up + row * row_stride + width + column, mask=inside)
    active = activate(gate.to(tl.float32), KIND).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + column, (active * up.to(tl.float32)).to(gate.dtype), mask=inside)
