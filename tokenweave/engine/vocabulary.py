"""Vocabulary: what turns text into tokens and back, and which tokens end a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Vocabulary:
    tokenizer: Any  # of transformers; None for a folder without one: token ids only, no text
    eos_token_ids: tuple[int, ...]


def read_vocabulary(folder: Path, hf_config: Any) -> Vocabulary:
    """A model folder's tokenizer, and the end tokens: its own, and those of generation_config.json or config.json."""
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    own = getattr(tokenizer, "eos_token_id", None)  # fine-tunes often have an end token that no config names
    stated = end_tokens(folder, hf_config)
    return Vocabulary(tokenizer, stated if own is None or own in stated else (*stated, own))


def end_tokens(folder: Path, hf_config: Any) -> tuple[int, ...]:
    eos = getattr(hf_config, "eos_token_id", None)
    if (folder / "generation_config.json").is_file():
        stated = GenerationConfig.from_pretrained(folder).eos_token_id
        eos = eos if stated is None else stated
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)
