"""Memory: what one rank must hold, and the largest batch and context that it has room for."""

from __future__ import annotations

from dataclasses import dataclass

from tokenweave.cost.hardware import Hardware
from tokenweave.cost.shape import ModelShape, shard_shape

USABLE = 0.9  # of the memory: the rest is for the driver, libraries, graphs and fragments
HALVES = 2  # a woven step has buffers for both


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest of W ranks. workspace: buffers of a step of the given tokens."""

    weights_bytes: int
    kv_bytes_per_token: int
    workspace_bytes: int
    usable_bytes: int

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit beside weights and workspace; 0 where not even those fit."""
        left = self.usable_bytes - self.weights_bytes - self.workspace_bytes
        return max(0, left // self.kv_bytes_per_token)

    def largest_batch(self, context_len: int) -> int:
        """Sequences of `context_len` tokens each that fit at once."""
        return self.kv_tokens // context_len

    def largest_context(self, batch_size: int) -> int:
        """Tokens a sequence that fit, for `batch_size` sequences at once."""
        return self.kv_tokens // batch_size


def memory_of(shape: ModelShape, hardware: Hardware, world_size: int, step_tokens: int = 2048) -> Memory:
    """What a rank holds; step_tokens: the most tokens of one step. Raises ValueError for heads that W cannot share."""
    return Memory(
        weights_bytes=weights_bytes(shape, world_size),
        kv_bytes_per_token=kv_bytes_per_token(shape, world_size),
        workspace_bytes=workspace_bytes(shape, world_size, step_tokens),
        usable_bytes=int(hardware.memory_bytes * USABLE),
    )


def weights_bytes(shape: ModelShape, world_size: int) -> int:
    """Of the fullest rank: layers, norms, router, embedding, and the LM head where it is not the embedding."""
    rank, hidden = shard_shape(shape, world_size), shape.hidden_size
    attention = (rank.qkv_heads + rank.heads) * shape.head_dim * hidden
    elements = rank.vocab_size * hidden * (1 if shape.tied else 2) + hidden
    for layer, size in zip(shape.layers, rank.intermediate_sizes, strict=True):
        mlps = max(1, layer.experts)
        elements += attention + mlps * 3 * size * hidden + layer.experts * hidden + (2 + shape.post_norms) * hidden
    return elements * shape.dtype_bytes


def kv_bytes_per_token(shape: ModelShape, world_size: int) -> int:
    """Keys and values of all layers; layers that slide keep all tokens, too, as the cache holds them today."""
    rank = shard_shape(shape, world_size)
    return 2 * len(shape.layers) * rank.kv_heads * shape.head_dim * shape.dtype_bytes


def workspace_bytes(shape: ModelShape, world_size: int, step_tokens: int) -> int:
    """Each half's partial, hidden and residual; the widest activations; fp32 logits of a few rows are left out."""
    rank = shard_shape(shape, world_size)
    buffers = HALVES * 3 * shape.hidden_size
    mlp = max(3 * size * max(1, layer.top_k) for layer, size in zip(shape.layers, rank.intermediate_sizes, strict=True))
    attention = (rank.qkv_heads + rank.heads) * shape.head_dim
    return step_tokens * (buffers + max(mlp, attention)) * shape.dtype_bytes


def smallest_world_size(shape: ModelShape, hardware: Hardware, tokens: int, step_tokens: int = 2048) -> int | None:
    """The fewest ranks (a power of two, heads shared evenly) that hold the model and `tokens` of cache; None: none."""
    for world_size in (2**power for power in range(shape.num_heads.bit_length())):
        if shape.num_heads % world_size or (shape.num_kv_heads % world_size and world_size % shape.num_kv_heads):
            continue
        if memory_of(shape, hardware, world_size, step_tokens).kv_tokens >= tokens:
            return world_size
    return None
