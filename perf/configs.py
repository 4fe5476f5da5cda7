"""Configs: published models as Hugging Face configs, made from their sizes alone: no hub, no weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.shape import ModelShape

MAX_POSITION = 131072  # tokens: prompts of any length that is measured fit
FAMILIES = {  # how a name begins -> transformers' model type
    "Llama": "llama",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Qwen2.5": "qwen2",
    "Qwen3": "qwen3",
    "OLMo-2": "olmo2",
    "Gemma-2": "gemma2",
}
TINY = {  # of any architecture, for a dry run; eight ranks can share it
    "hidden_size": 64,
    "head_dim": 8,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
TINY_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def config_of(name: str) -> Any:
    """The transformers config of a model in PUBLISHED, of MAX_POSITION tokens and in bfloat16."""
    shape = PUBLISHED[name]
    kind = next(kind for start, kind in FAMILIES.items() if name.startswith(start))
    if shape.layers[0].experts and kind == "qwen3":
        kind = "qwen3_moe"
    return AutoConfig.for_model(
        kind, architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]], **sizes(shape), **layers(shape)
    )


def sizes(shape: ModelShape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": len(shape.layers),
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": MAX_POSITION,
        "dtype": shape.dtype,
    }


def layers(shape: ModelShape) -> dict[str, Any]:
    """What the config says of MLPs, experts and windows."""
    first = shape.layers[0]
    told: dict[str, Any] = {"intermediate_size": first.intermediate_size, "sliding_window": first.window}
    if first.experts:
        counts = {"num_experts_per_tok": first.top_k, "moe_intermediate_size": first.intermediate_size}
        told |= counts | {"num_local_experts": first.experts, "num_experts": first.experts}
    return told


def shrink(config: Any) -> Any:
    """The same architecture, TINY: in place, and returned."""
    for name, value in (TINY | TINY_EXPERTS).items():
        if hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: TINY["num_hidden_layers"]]
    return config
