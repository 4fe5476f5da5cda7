"""Tiny random checkpoints in the real architectures, as Hugging Face folders.

Usage, in a test (`checkpoint` is a fixture of conftest.py; a folder is made once per session and shared: never write
into it, copy it):

    def test_logits(checkpoint):
        folder = checkpoint("gemma2")                  # a pathlib.Path; also checkpoint(name, seed=1, dtype="bfloat16")

    @pytest.mark.parametrize("name", ARCHITECTURES)    # every architecture that the runtime claims
    ...
    if not ARCHITECTURES[name].fits(world_size): ...   # whether its head counts divide (or replicate) over the ranks

Each folder holds config.json (some in the spelling of transformers 5, some in that of the hub), safetensors (some
sharded, with an index), generation_config.json, and a byte-level tokenizer with a chat template: token id = byte
value, then bos, eos, pad. The weights are drawn so that everything shows: attention attends, norm weights and biases
matter, logits are spread, and greedy text neither stands still nor hangs on near-ties. (transformers' own init, of
std 0.02, gives nearly uniform logits.)
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 259  # divisible by 7 and 37 only: every world size gets uneven vocabulary shards
BOS, EOS, PAD = 256, 257, 258
# Dynamic rope changes at 256 tokens: 230 crosses them while decoding, 700 starts beyond.
PROMPT_LENGTHS = (1, 3, 17, 64, 230, 700)

LOGIT_STD = 3.0

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Architecture:
    """One architecture to test: `options` are config keywords on top of SMALL.

    `old_config` writes config.json as hub folders from before transformers 5 have it (rope_theta, rope_scaling, no
    layer_types); `config_edits` are written into it last; `max_shard_size` splits the weights into several files.
    """

    name: str
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    old_config: bool = False
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    max_shard_size: str = "1GB"

    @property
    def heads(self) -> int:
        return {**SMALL, **self.options}["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return {**SMALL, **self.options}["num_key_value_heads"]

    @property
    def dynamic_rope(self) -> bool:
        return self.options.get("rope_parameters", {}).get("rope_type") == "dynamic"

    def fits(self, world_size: int) -> bool:
        """Whether heads divide over the ranks, and KV heads divide or replicate."""
        whole_kv_heads = self.kv_heads % world_size == 0 or world_size % self.kv_heads == 0
        return self.heads % world_size == 0 and whole_kv_heads


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
_YARN = _rope("yarn", factor=8.0, original_max_position_embeddings=128)
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_EXPERTS = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GEMMA2 = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "sliding_window": 32,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 20.0,
    "tie_word_embeddings": True,
}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "llama", max_shard_size="150KB"),
        Architecture("llama_llama3", "llama", {"rope_parameters": _LLAMA3, "num_key_value_heads": 2}, old_config=True),
        Architecture("llama_linear", "llama", {"rope_parameters": _rope("linear", factor=4.0)}, old_config=True),
        Architecture(
            "llama_dynamic",
            "llama",
            {"rope_parameters": _rope("dynamic", factor=4.0), "max_position_embeddings": 256, "num_key_value_heads": 8},
        ),
        Architecture(
            "llama_yarn",
            "llama",
            {"rope_parameters": _YARN, "hidden_size": 96, "intermediate_size": 144, "head_dim": 16},
        ),
        Architecture("llama_bias", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        Architecture("llama_head_dim", "llama", {"head_dim": 12, "num_key_value_heads": 2}),
        # The only one that W = 3 and 6 can take, and that W = 2 cannot.
        Architecture(
            "llama_six_heads", "llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
        ),
        Architecture("mistral", "mistral", {"sliding_window": 24, "num_key_value_heads": 2}, old_config=True),
        # As on the hub: a window is written down, and switched off.
        Architecture("qwen2", "qwen2", old_config=True, config_edits={"sliding_window": 8, "max_window_layers": 1}),
        Architecture(
            "qwen2_window",
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_key_value_heads": 2},
            old_config=True,
        ),
        Architecture("qwen3", "qwen3", {"head_dim": 16}, max_shard_size="150KB"),
        Architecture("mixtral", "mixtral", dict(_EXPERTS, num_key_value_heads=2), old_config=True),
        Architecture("qwen3_moe", "qwen3_moe", dict(_QWEN3_EXPERTS, norm_topk_prob=True, mlp_only_layers=[0])),
        Architecture(
            "qwen3_moe_raw_topk", "qwen3_moe", dict(_QWEN3_EXPERTS, norm_topk_prob=False, num_hidden_layers=2)
        ),
        # Two KV heads: q and k are normalised over all heads, which four ranks hold with copies.
        Architecture("olmo2", "olmo2", {"num_key_value_heads": 2}),
        Architecture("gemma2", "gemma2", _GEMMA2, old_config=True),
    )
}


def build_checkpoint(root: Path, name: str, seed: int = 0, dtype: str = "float32") -> Path:
    """Folder `root/<name>-<seed>-<dtype>` with the checkpoint in that dtype, made if it is not there yet."""
    folder = root / f"{name}-{seed}-{dtype}"
    if not folder.exists():
        unfinished = root / f".{folder.name}.{os.getpid()}"
        _write(ARCHITECTURES[name], seed, getattr(torch, dtype), unfinished)
        unfinished.rename(folder)
    return folder


def prompt_batch(seed: int, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    """One prompt of random bytes (token ids below 256) per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def _write(architecture: Architecture, seed: int, dtype: torch.dtype, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    config = AutoConfig.for_model(architecture.model_type, **{**SMALL, **architecture.options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=architecture.max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    _edit_config(folder / "config.json", architecture)


def _edit_config(path: Path, architecture: Architecture) -> None:
    config = json.loads(path.read_text())
    if architecture.old_config:
        config = _old_spelling(config)
    path.write_text(json.dumps({**config, **architecture.config_edits}, indent=2) + "\n")


def _old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]
    return config


# -- weights ----------------------------------------------------------------------------------------------------------


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter in place; each draws from its own generator, so a parameter more changes no other."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            parameter.copy_(_draw(name, parameter.shape, model.config, generator))


def _draw(name: str, shape: torch.Size, config: Any, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return _norm_weight(name, shape, config, generator)
    normal = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return 0.3 * normal
    if "embed_tokens" in name:
        return _embedding(normal, config)
    return (_heavy_tailed(normal, 3) if "lm_head" in name else normal) * _gain(name) / shape[-1] ** 0.5


def _gain(name: str) -> float:
    gains = {"q_proj": 1.5, "k_proj": 1.5, "v_proj": 1.5, "o_proj": 2.0, "lm_head": LOGIT_STD, "down_proj": 3.0}
    return next((gain for part, gain in gains.items() if part in name), 1.5)


def _heavy_tailed(normal: torch.Tensor, power: int) -> torch.Tensor:
    """Unit variance; sets the best token further apart from the second than a normal distribution would."""
    variance = math.prod(range(1, 2 * power, 2))  # of a standard normal's power: (2 power - 1)!!
    return normal.sign() * normal.abs() ** power / variance**0.5


def _embedding(normal: torch.Tensor, config: Any) -> torch.Tensor:
    """Unit variance where it enters the model. With the heavier tail of an LM head, few tokens would make all text."""
    entering = _heavy_tailed(normal, 2) if config.tie_word_embeddings else normal
    gemma_scale = config.hidden_size**0.5  # by which Gemma multiplies what it looks up
    return entering / gemma_scale if config.model_type == "gemma2" else entering


def _norm_weight(name: str, shape: torch.Size, config: Any, generator: torch.Generator) -> torch.Tensor:
    weight = 0.5 + torch.rand(shape, generator=generator)
    if "q_norm" in name or "k_norm" in name:
        weight = 1.5 * weight
    if name == "model.norm.weight" and config.tie_word_embeddings:
        weight = _tied_final_norm(weight, config, generator)
    return weight - 1 if config.model_type == "gemma2" else weight


def _tied_final_norm(weight: torch.Tensor, config: Any, generator: torch.Generator) -> torch.Tensor:
    """Scaled to logits of LOGIT_STD; with random signs, or a token's embedding times itself would predict it again."""
    signs = 2 * torch.randint(0, 2, weight.shape, generator=generator) - 1
    logit_std = 1.0 if config.model_type == "gemma2" else config.hidden_size**0.5
    return LOGIT_STD / logit_std * signs * weight


# -- tokenizer --------------------------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """Byte-level tokenizer without merges: token id = byte value; <bos>, <eos>, <pad> are 256, 257, 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (as GPT-2 began it)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
