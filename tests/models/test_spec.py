"""From a folder's config to a DecoderSpec, and which world sizes a model can take."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from tests.checkpoints import ARCHITECTURES as CHECKPOINTS
from tests.checkpoints import SMALL
from tokenweave.models import registry
from tokenweave.models.decoder import Decoder, kv_share
from tokenweave.models.layers import Place
from tokenweave.models.registry import ARCHITECTURES, read_config, read_spec
from tokenweave.models.spec import DecoderSpec, NormNames, check_world_size, fits

BASE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "intermediate_size": 96,
    "max_position": 1024,
    "norms": NormNames(),
    "norm_offset": 0.0,
    "qk_norm": None,
    "qkv_bias": False,
    "attn_out_bias": False,
    "mlp_bias": False,
    "activation": "silu",
    "scale": 8**-0.5,
    "attention_softcap": None,
    "logits_softcap": None,
    "embed_scale": None,
    "tied": False,
    "windows": (),
    "experts": (),
}
# What each test checkpoint is, where it differs from BASE.
EXPECTED = {
    "llama": {},
    "llama_llama3": {"num_kv_heads": 2},
    "llama_linear": {},
    "llama_dynamic": {"num_kv_heads": 8, "max_position": 256},
    "llama_yarn": {"hidden_size": 96, "intermediate_size": 144, "head_dim": 16, "scale": 0.25},
    "llama_bias": {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True, "tied": True},
    "llama_head_dim": {"head_dim": 12, "num_kv_heads": 2, "scale": 12**-0.5},
    "llama_six_heads": {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 3, "head_dim": 16, "scale": 0.25},
    "mistral": {"num_kv_heads": 2, "windows": (24, 24, 24)},
    "qwen2": {"qkv_bias": True, "windows": (None, None, None)},
    "qwen2_window": {"qkv_bias": True, "num_kv_heads": 2, "windows": (None, 24, 24)},
    "qwen3": {"head_dim": 16, "scale": 0.25, "qk_norm": "head", "windows": (None, None, None)},
    "mixtral": {"num_kv_heads": 2, "windows": (None, None, None)},
    "qwen3_moe": {"head_dim": 16, "scale": 0.25, "qk_norm": "head", "windows": (None, None, None)},
    "qwen3_moe_raw_topk": {
        "head_dim": 16,
        "scale": 0.25,
        "qk_norm": "head",
        "num_layers": 2,
        "windows": (None, None),
    },
    "olmo2": {
        "num_kv_heads": 2,
        "qk_norm": "all",
        "norms": NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    },
    "gemma2": {
        "num_layers": 4,
        "head_dim": 16,
        "tied": True,
        "activation": "gelu_pytorch_tanh",
        "norm_offset": 1.0,
        "scale": 24**-0.5,
        "attention_softcap": 5.0,
        "logits_softcap": 20.0,
        "embed_scale": 8.0,
        "windows": (32, None, 32, None),
        "norms": NormNames(
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
        ),
    },
}
# Per layer: None, or (experts, of them used, their width, whether weights are renormalised).
EXPECTED_EXPERTS = {
    "mixtral": [(4, 2, 96, True)] * 3,
    "qwen3_moe": [None] + [(6, 2, 48, True)] * 2,
    "qwen3_moe_raw_topk": [(6, 2, 48, False)] * 2,
}


def spec_of(folder) -> DecoderSpec:
    return read_spec(folder, read_config(folder))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_entry_of_the_registry(name, checkpoint):
    spec = spec_of(checkpoint(name))
    expected = BASE | EXPECTED[name]
    if name in EXPECTED_EXPERTS:
        experts = [spec.experts_of(i) for i in range(spec.num_layers)]
        got = [one and (one.count, one.top_k, one.intermediate_size, one.renormalise) for one in experts]
        assert got == EXPECTED_EXPERTS[name]
        del expected["experts"]
    assert {field: getattr(spec, field) for field in expected} == expected


def test_every_architecture_has_a_checkpoint_to_test_it_with(checkpoint):
    tested = {read_config(checkpoint(name)).architectures[0] for name in CHECKPOINTS}
    assert tested == set(ARCHITECTURES)


def test_scale_and_windows_have_plain_defaults():
    spec = registry.llama(AutoConfig.for_model("llama", **SMALL))
    assert replace(spec, attention_scale=0.5).scale == 0.5
    assert spec.scale == spec.head_dim**-0.5
    assert [spec.window(i) for i in range(3)] == [None] * 3
    assert [spec.experts_of(i) for i in range(3)] == [None] * 3


def test_qwen3_moe_without_experts_in_every_other_layer():
    options = {**SMALL, "num_hidden_layers": 4, "num_experts": 6, "moe_intermediate_size": 48, "decoder_sparse_step": 2}
    spec = registry.qwen3_moe(AutoConfig.for_model("qwen3_moe", **options))
    assert [one is not None for one in spec.experts] == [False, True, False, True]


# -- configs that cannot be used ---------------------------------------------------------------------------------------


@pytest.fixture
def edited(checkpoint, tmp_path):
    """edited(**changes) -> a folder with the llama checkpoint's config, changed."""

    def folder(**changes):
        config = json.loads((checkpoint("llama") / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return tmp_path

    return folder


def said_in_one_line(folder, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        spec_of(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SUPPORTED = f"supported architectures: {', '.join(ARCHITECTURES)}"


def test_an_architecture_that_is_not_supported(edited):
    message = said_in_one_line(edited(architectures=["GPT2LMHeadModel"], model_type="gpt2"))
    assert message.endswith(f"config.json asks for the architecture GPT2LMHeadModel; {SUPPORTED}")


def test_an_architecture_with_a_typing_error(edited):
    assert "LamaForCausalLM (did you mean LlamaForCausalLM?); supported" in said_in_one_line(
        edited(architectures=["LamaForCausalLM"])
    )


@pytest.mark.parametrize("architectures", [None, []])
def test_no_architecture_at_all(architectures, edited):
    assert f"asks for the architecture (none given); {SUPPORTED}" in said_in_one_line(
        edited(architectures=architectures)
    )


def test_a_model_type_that_transformers_does_not_know(edited):
    message = said_in_one_line(edited(model_type="llama17", architectures=["Llama17ForCausalLM"]))
    assert "config.json cannot be used" in message
    assert "llama17" in message
    assert message.endswith(SUPPORTED)


def test_a_config_that_is_no_json(edited):
    folder = edited()
    (folder / "config.json").write_text("{")
    assert "config.json cannot be used" in said_in_one_line(folder)


def test_a_folder_without_config(tmp_path):
    assert said_in_one_line(tmp_path, FileNotFoundError).endswith(
        "has no config.json; expected the folder of a Hugging Face model"
    )


# -- world sizes -------------------------------------------------------------------------------------------------------


def heads(checkpoint, num_heads: int, num_kv_heads: int) -> DecoderSpec:
    return replace(spec_of(checkpoint("llama")), num_heads=num_heads, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "fitting"),
    [
        (8, 8, [1, 2, 4, 8]),
        (8, 4, [1, 2, 4, 8]),
        (8, 2, [1, 2, 4, 8]),
        (8, 1, [1, 2, 4, 8]),
        (6, 3, [1, 3, 6]),
        (6, 2, [1, 2, 6]),
        (12, 4, [1, 2, 4, 12]),
        (24, 8, [1, 2, 4, 8, 24]),
        (28, 4, [1, 2, 4, 28]),
        (1, 1, [1]),
        (7, 7, [1, 7]),
    ],
)
def test_which_world_sizes_fit(num_heads, num_kv_heads, fitting, checkpoint):
    spec = heads(checkpoint, num_heads, num_kv_heads)
    assert [size for size in range(1, 2 * num_heads + 2) if fits(spec, size)] == fitting


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "world_size", "fitting"),
    [
        (8, 4, 3, "1, 2, 4, 8"),
        (6, 3, 2, "1, 3, 6"),
        (8, 4, 16, "1, 2, 4, 8"),
        (28, 4, 8, "1, 2, 4, 28"),
        (1, 1, 2, "1"),
    ],
)
def test_the_error_names_the_counts_and_what_fits(num_heads, num_kv_heads, world_size, fitting, checkpoint):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        check_world_size(heads(checkpoint, num_heads, num_kv_heads), world_size)
    assert str(caught.value) == (
        f"the model has {num_heads} attention heads and {num_kv_heads} key-value heads, which {world_size} ranks "
        f"cannot share evenly; world sizes that fit: {fitting}"
    )


def test_a_model_is_not_built_for_a_world_size_that_it_cannot_take(checkpoint):
    config = read_config(checkpoint("llama"))
    place = Place(0, 3, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"8 attention heads and 4 key-value heads, which 3 ranks"):
        Decoder(read_spec(checkpoint("llama"), config), config, 64, place)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (6, 2), (12, 4), (24, 8)]
)
def test_each_ranks_heads_read_the_key_value_heads_that_it_holds(num_heads, num_kv_heads, checkpoint):
    """As many query heads to each of them on every rank: what grouped attention takes for granted."""
    spec = heads(checkpoint, num_heads, num_kv_heads)
    for world_size in filter(lambda size: fits(spec, size), range(1, num_heads + 1)):
        for rank in range(world_size):
            place = Place(rank, world_size, torch.float32, torch.device("cpu"))
            ours, held = place.share(num_heads), kv_share(num_kv_heads, place)
            needed = [head * num_kv_heads // num_heads for head in ours]
            group = len(ours) // len(held)
            assert needed == [kv_head for kv_head in held for _ in range(group)]


def copies(weight: str, spec: DecoderSpec, world_size: int) -> int:
    """How many ranks hold each element of a weight."""
    by_kv_head = ("k_proj", "v_proj", "k_norm") if spec.qk_norm == "all" else ("k_proj", "v_proj")
    if any(name in weight for name in by_kv_head):
        return max(1, world_size // spec.num_kv_heads)
    by_head = "q_norm" in weight and spec.qk_norm == "all"
    return world_size if ("norm" in weight and not by_head) or weight.endswith("mlp.gate.weight") else 1


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "olmo2"])
def test_ranks_share_the_weights_out(name, world_size, checkpoint):
    config = read_config(checkpoint(name))
    spec = read_spec(checkpoint(name), config)

    def sizes(place: Place) -> dict[str, int]:
        return {load.name: load.into.numel() for load in Decoder(spec, config, 64, place).loads()}

    cpu = torch.device("cpu")
    held = [sizes(Place(rank, world_size, torch.float32, cpu)) for rank in range(world_size)]
    for weight, size in sizes(Place(0, 1, torch.float32, cpu)).items():
        assert sum(of_rank[weight] for of_rank in held) == copies(weight, spec, world_size) * size, weight
