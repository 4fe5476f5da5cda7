"""Activations, as parts of Triton kernels."""

import triton
import triton.language as tl

KINDS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}  # by the name that a model's config gives


@triton.jit
def activate(x, KIND: tl.constexpr):
    """fp32 in and out. KIND: one of KINDS' values."""
    if KIND == "silu":
        return x / (1 + tl.exp(-x))
    elif KIND == "gelu_tanh":  # 0.5 x (1 + tanh(y)) is x sigmoid(2 y)
        y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1 + tl.exp(-2 * y))
    else:
        tl.static_assert(KIND == "gelu")
        return 0.5 * x * (1 + tl.erf(0.7071067811865476 * x))
