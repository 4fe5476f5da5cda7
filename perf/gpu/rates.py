"""Rates: what this device does at best, which shares of a goal refer to; and what a step must do at least."""

from __future__ import annotations

import torch

from perf.gpu.clock import median_s
from perf.gpu.scale import Scale
from tokenweave.cost.ops import visible_pairs

COPIES, PRODUCTS = 8, 8  # in a row, so that a launch counts for nothing


def matmul_flops_per_s(scale: Scale) -> float:
    """Of a square matmul in the scale's dtype."""
    size, device = scale.matmul_size, scale.torch_device
    x, y = (torch.randn(size, size, device=device).to(scale.torch_dtype) for _ in range(2))
    out = torch.empty_like(x)

    def run() -> None:
        for _ in range(PRODUCTS):
            torch.mm(x, y, out=out)

    return PRODUCTS * 2.0 * size**3 / median_s(run, device, 5)


def copy_bytes_per_s(scale: Scale) -> float:
    """Of a copy within the device's memory, bytes read and written both counted."""
    source = torch.ones(scale.copy_bytes, dtype=torch.uint8, device=scale.torch_device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    return COPIES * 2.0 * scale.copy_bytes / median_s(run, scale.torch_device, 5)


def layer_parameters(scale: Scale) -> int:
    """Weights of all layers' matrices."""
    shape = scale.shape
    hidden, heads, kv_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    qkv_out = hidden * (2 * hidden + 2 * kv_heads * (hidden // heads))
    return shape["num_hidden_layers"] * (qkv_out + 3 * hidden * shape["intermediate_size"])


def prefill_flops(scale: Scale, tokens: int) -> float:
    """Of one prompt: the layers on every token, causal attention, the LM head on the last token."""
    shape = scale.shape
    attention = 4.0 * shape["hidden_size"] * visible_pairs(tokens, 0, None) * shape["num_hidden_layers"]
    return 2.0 * tokens * layer_parameters(scale) + attention + 2.0 * shape["vocab_size"] * shape["hidden_size"]


def decode_bytes(scale: Scale, batch: int, context: float) -> float:
    """What one decoding step must read: every weight but the embedding table, and keys and values of all sequences."""
    shape, item = scale.shape, scale.torch_dtype.itemsize
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    key_value = 2 * shape["num_key_value_heads"] * head_dim * shape["num_hidden_layers"]
    weights = layer_parameters(scale) + shape["vocab_size"] * shape["hidden_size"]
    return item * (weights + batch * context * key_value)
