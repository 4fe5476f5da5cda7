"""From a config to sizes, and what of them a rank holds."""

from __future__ import annotations

import json

import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen3MoeConfig

from tokenweave.cost.parts import repeated
from tokenweave.cost.shape import LayerShape, read_shape, shard_shape

LLAMA = {
    "vocab_size": 1001,
    "hidden_size": 256,
    "intermediate_size": 500,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def test_a_config_a_file_and_a_folder_say_the_same(tmp_path):
    config = LlamaConfig(**LLAMA, dtype="bfloat16")
    shape = read_shape(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert read_shape(tmp_path) == read_shape(str(tmp_path / "config.json")) == read_shape(shape) == shape
    assert (shape.hidden_size, shape.head_dim, shape.layers) == (256, 32, (LayerShape(None, 500),) * 3)
    assert (shape.dtype, shape.dtype_bytes) == ("bfloat16", 2)
    assert read_shape(config, dtype="float32").dtype_bytes == 4
    assert read_shape(json.loads((tmp_path / "config.json").read_text())) == shape
    assert shape.max_len == config.max_position_embeddings
    stretched = LlamaConfig(**LLAMA, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    assert read_shape(stretched).max_len == 4 * config.max_position_embeddings


def test_windows_experts_and_norms():
    assert {layer.window for layer in read_shape(MistralConfig(**LLAMA, sliding_window=64)).layers} == {64}
    gemma = read_shape(Gemma2Config(**{**LLAMA, "num_hidden_layers": 4, "head_dim": 32}, sliding_window=64))
    assert [layer.window for layer in gemma.layers] == [64, None, 64, None]
    assert gemma.post_norms == 2
    moe = read_shape(Qwen3MoeConfig(**LLAMA, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96))
    assert moe.layers == (LayerShape(None, 96, 16, 4),) * 3
    assert moe.qk_norm == "head"


def test_sharding_is_that_of_the_models():
    shape = read_shape(LlamaConfig(**LLAMA))
    rank = shard_shape(shape, 4)
    assert (rank.heads, rank.kv_heads, rank.intermediate_sizes, rank.vocab_size) == (2, 1, (125,) * 3, 251)
    assert shard_shape(shape, 8).kv_heads == 1  # four ranks hold the same one
    assert shard_shape(shape, 1).qkv_heads == 12


def test_what_cannot_be_is_refused(tmp_path):
    shape = read_shape(LlamaConfig(**LLAMA))
    with pytest.raises(ValueError, match="world sizes that fit: 1, 2, 4, 8"):
        shard_shape(shape, 3)
    for world_size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="world_size must be a whole number >= 1"):
            shard_shape(shape, world_size)
    with pytest.raises(ValueError, match="supported architectures: LlamaForCausalLM"):
        read_shape(GPT2Config())
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        read_shape(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLMs"]}))
    with pytest.raises(ValueError, match=r"did you mean LlamaForCausalLM\?"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("", []),
        ("a", [("a", 1)]),
        ("aaaa", [("a", 4)]),
        ("ababab", [("ab", 3)]),
        ("abababa", [("ab", 3), ("a", 1)]),
        ("aaabaaab", [("aaab", 2)]),
        ("aabbbb", [("a", 2), ("b", 4)]),
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
    ],
)
def test_layers_that_repeat(layers, expected):
    assert [("".join(pattern), times) for pattern, times in repeated(layers)] == expected
