"""Models to measure with: random weights in a named shape, as a Hugging Face folder in a cache of their own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

USER = "TOKENWEAVE_PERF_USER"  # the user's id, where a user namespace shows another
SHAPES: dict[str, dict[str, Any]] = {
    "llama-128x2": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "llama-512x8": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "llama-1024x8": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16},
}


def model_folder(shape: str) -> Path:
    """The folder of a random Llama in that shape (fp32, grouped-query attention, 8192 tokens), made at first use."""
    user = os.environ.get(USER, os.getuid())
    folder = Path(tempfile.gettempdir()) / f"tokenweave-perf-{user}" / shape
    if not (folder / "config.json").is_file():
        config = LlamaConfig(
            vocab_size=8192,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            **SHAPES[shape],
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(0, 8192, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
