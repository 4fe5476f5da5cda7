"""From a Hugging Face config to a DecoderSpec. To add an architecture, add a function and its line at the end."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenweave.models.spec import DecoderSpec, ExpertsSpec, NormNames


def llama(config: Any) -> DecoderSpec:
    """Llama, and what every other architecture below starts from."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_bias = getattr(config, "attention_bias", False)
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        max_position=config.max_position_embeddings,
        rope=dict(config.rope_parameters),
        qkv_bias=attention_bias,
        attn_out_bias=attention_bias,
        mlp_bias=getattr(config, "mlp_bias", False),
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        tied=config.tie_word_embeddings,
    )


def mistral(config: Any) -> DecoderSpec:
    """Llama with a sliding window in every layer."""
    return replace(llama(config), windows=(config.sliding_window,) * config.num_hidden_layers)


def qwen2(config: Any) -> DecoderSpec:
    """Llama with q, k, v biases; upper layers may slide."""
    return replace(llama(config), qkv_bias=True, attn_out_bias=False, windows=windows_by_type(config))


def qwen3(config: Any) -> DecoderSpec:
    """Llama with a norm on each head of q and k; upper layers may slide."""
    return replace(llama(config), qk_norm="head", windows=windows_by_type(config))


def mixtral(config: Any) -> DecoderSpec:
    """Mistral with a mixture of experts in every layer."""
    experts = ExpertsSpec(
        count=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        renormalise=True,
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{e}",
        gate="w1",
        up="w3",
        down="w2",
    )
    return replace(mistral(config), experts=(experts,) * config.num_hidden_layers)


def qwen3_moe(config: Any) -> DecoderSpec:
    """Qwen3 with a mixture of experts in most layers."""
    experts = ExpertsSpec(
        count=config.num_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        renormalise=config.norm_topk_prob,
        router="mlp.gate",
        expert="mlp.experts.{e}",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    )
    sparse = [
        i not in config.mlp_only_layers and config.num_experts > 0 and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]
    by_layer = tuple(experts if is_sparse else None for is_sparse in sparse)
    return replace(mistral(config), qk_norm="head", experts=by_layer)


def olmo2(config: Any) -> DecoderSpec:
    """Norms after the blocks only, and a norm over all heads of q and k together."""
    norms = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    return replace(llama(config), norms=norms, qk_norm="all")


def gemma2(config: Any) -> DecoderSpec:
    """Norms before and after every block, weights stored as offsets from 1, soft caps, alternating windows."""
    norms = NormNames(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )
    return replace(
        llama(config),
        norms=norms,
        norm_offset=1.0,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        logits_softcap=config.final_logit_softcapping,
        embed_scale=config.hidden_size**0.5,
        windows=windows_by_type(config),
    )


def windows_by_type(config: Any) -> tuple[int | None, ...]:
    """Per layer, the sliding window where the layer's type asks for one."""
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


ARCHITECTURES: dict[str, Callable[[Any], DecoderSpec]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "MixtralForCausalLM": mixtral,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Olmo2ForCausalLM": olmo2,
    "Gemma2ForCausalLM": gemma2,
}


def read_config(folder: Path) -> Any:
    """The folder's transformers config. Raises FileNotFoundError or ValueError, in one line."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; expected the folder of a Hugging Face model")
    from transformers import AutoConfig  # here, because it takes seconds to import, and published sizes need none of it

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers and the hub's client raise many kinds for what they cannot use
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}/config.json cannot be used: {reason}; {supported()}") from error


def read_spec(folder: Path, config: Any) -> DecoderSpec:
    """The spec of a model folder. Raises ValueError for an architecture that is not in the table."""
    names = getattr(config, "architectures", None) or ["(none given)"]
    if names[0] not in ARCHITECTURES:
        near = difflib.get_close_matches(names[0], ARCHITECTURES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{folder}/config.json asks for the architecture {names[0]}{hint}; {supported()}")
    return ARCHITECTURES[names[0]](config)


def supported() -> str:
    return f"supported architectures: {', '.join(ARCHITECTURES)}"
