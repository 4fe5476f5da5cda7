"""Models to measure with: random weights in a named shape, or any folder or hub id; and prompts for them."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from perf.configs import config_of, shrink
from tokenweave.cli.plan_model import nearest, without_suffix
from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.shape import read_shape, shard_shape
from tokenweave.models.hub import resolve
from tokenweave.models.registry import read_config

USER = "TOKENWEAVE_PERF_USER"  # the user's id, where a user namespace shows another
SHAPES: dict[str, dict[str, Any]] = {  # small Llamas whose checkpoint is made, so that peers can read it
    "llama-128x2": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "llama-512x8": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "llama-1024x8": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16},
}
TINY = "tiny "  # before a name: that architecture with next to no sizes, for a dry run


MAX_POSITION = 4096  # tokens, of SHAPES
VOCAB_SIZE = 8192  # of SHAPES, and of prompts


@dataclass(frozen=True)
class Model:
    """folder: with a config.json at least. load_format: as EngineConfig's; "dummy" where the folder has no weights."""

    folder: str
    load_format: str


def full_name(text: str) -> str:
    """The one spelling of a model. Raises ValueError, in one line, for what is neither a name nor a folder nor an id.

    text: one of SHAPES or PUBLISHED (any case, -Instruct and the like left out), a folder, or a hub id 'org/name'.
    """
    if text in SHAPES:
        return text
    if (folder := Path(text).expanduser()).is_dir():
        return str(folder.absolute())
    known = {name.lower(): name for name in PUBLISHED}
    if name := known.get(without_suffix(text.lower(), known)):
        return name
    if "/" in text:
        return text
    raise ValueError(
        f"unknown model {text!r}{nearest(text)}; give a folder, a hub id 'org/name', one of {', '.join(SHAPES)}, or a "
        f"published model such as Llama-3.3-70B (tokenweave.cost.published lists {len(PUBLISHED)})"
    )


def find_model(name: str) -> Model:
    """By its full name, TINY before it or not. Of a hub id config.json alone is downloaded. One process at a time."""
    if name in SHAPES:
        return Model(str(model_folder(name)), "auto")
    if name in PUBLISHED:
        return Model(str(config_folder(name, config_of(name))), "dummy")
    if name.startswith(TINY):
        whole = Path(find_model(name.removeprefix(TINY)).folder)
        return Model(str(config_folder(name, shrink(read_config(whole)))), "dummy")
    folder = resolve(name, weights=False)
    return Model(str(folder), "auto" if any(folder.glob("*.safetensors")) else "dummy")


def find_config(name: str) -> Any:
    """The transformers config of a model, by its full name. Makes no checkpoint."""
    return llama_config(name) if name in SHAPES else read_config(Path(find_model(name).folder))


def check(name: str, world_size: int, tokens: int) -> None:
    """Raises ValueError, in one line, where so many ranks cannot share the model, or it is not made for the tokens."""
    config = find_config(name)
    shard_shape(read_shape(config), world_size)
    if tokens > config.max_position_embeddings:
        raise ValueError(f"{name} was made for {config.max_position_embeddings} tokens, not {tokens}")


def cache() -> Path:
    return Path(tempfile.gettempdir()) / f"tokenweave-perf-{os.environ.get(USER, os.getuid())}"


def config_folder(name: str, config: Any) -> Path:
    """A folder with that config.json and nothing else."""
    folder = cache() / name.replace("/", "--").replace(" ", "-")
    config.save_pretrained(folder)
    return folder


def model_folder(shape: str) -> Path:
    """The folder of a random Llama in that shape (fp32, grouped-query attention, 8192 tokens), made at first use."""
    folder = cache() / shape
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(llama_config(shape)).save_pretrained(folder)
    return folder


def llama_config(shape: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=False,
        **SHAPES[shape],
    )


def prompt(tokens: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Random token ids."""
    return torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
