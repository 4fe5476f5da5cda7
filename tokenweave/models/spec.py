"""DecoderSpec: everything in which the supported decoder architectures differ, as plain numbers and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NormNames:
    """The four places where a layer may normalise, by checkpoint name; None where it does not.

    attn_in and mlp_in normalise the residual before a block; attn_out and mlp_out a block's output before it is added.
    """

    attn_in: str | None = "input_layernorm"
    attn_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture-of-experts block. Names are relative to the layer."""

    count: int
    top_k: int
    intermediate_size: int
    renormalise: bool
    router: str
    expert: str  # with {e} for the expert's number
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder-only transformer. Sizes count elements of the whole model, not of one rank."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    max_position: int
    rope: Mapping[str, Any]  # transformers' rope_parameters
    norms: NormNames = NormNames()
    norm_offset: float = 0.0
    qk_norm: str | None = None  # None | "head": over head_dim | "all": over all heads together
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embed_scale: float | None = None
    tied: bool = False
    windows: tuple[int | None, ...] = ()  # per layer; () = no layer slides
    experts: tuple[ExpertsSpec | None, ...] = ()  # per layer; () = every layer is dense

    @property
    def scale(self) -> float:
        return self.attention_scale if self.attention_scale is not None else self.head_dim**-0.5

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def experts_of(self, layer: int) -> ExpertsSpec | None:
        return self.experts[layer] if self.experts else None


def fits(spec: DecoderSpec, world_size: int) -> bool:
    """Attention heads are never cut: ranks share them out evenly, and KV heads evenly or by replication."""
    kv_even = spec.num_kv_heads % world_size == 0 or world_size % spec.num_kv_heads == 0
    return spec.num_heads % world_size == 0 and kv_even


def check_world_size(spec: DecoderSpec, world_size: int) -> None:
    """Raises ValueError naming the head counts and the world sizes that fit, unless `world_size` does."""
    if not fits(spec, world_size):
        fitting = [w for w in range(1, spec.num_heads + 1) if fits(spec, w)]
        raise ValueError(
            f"the model has {spec.num_heads} attention heads and {spec.num_kv_heads} key-value heads, which "
            f"{world_size} ranks cannot share evenly; world sizes that fit: {', '.join(map(str, fitting))}"
        )


def longest(spec: DecoderSpec) -> int:
    """Tokens the model was made for; dynamic rope is made for `factor` times its trained length."""
    stretch = spec.rope.get("factor", 1.0) if spec.rope.get("rope_type") == "dynamic" else 1.0
    return int(spec.max_position * stretch)
