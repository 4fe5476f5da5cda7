"""The model that is measured: a Llama in the scale's shape with random weights, in tokenweave and in transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from perf.gpu.scale import Scale
from tokenweave import LLM, SamplingParams
from tokenweave.models.decoder import Decoder


@contextmanager
def config_folder(scale: Scale) -> Iterator[Path]:
    """A folder with config.json alone; weights are made on the device (load_format="dummy")."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / scale.name
        config = LlamaConfig(
            max_position_embeddings=scale.max_model_len, tie_word_embeddings=False, rms_norm_eps=1e-5, **scale.shape
        )
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        yield folder


@contextmanager
def opened(scale: Scale, folder: Path, **options: Any) -> Iterator[LLM]:
    """An LLM on one rank, without prefix reuse, so that a prompt may be measured more than once."""
    base = {"device": scale.device, "dtype": scale.dtype, "max_model_len": scale.max_model_len}
    base |= {"load_format": "dummy", "enable_prefix_caching": False, "progress": False, "overlap": "off"}
    with LLM(folder, **(base | options)) as llm:
        yield llm
    free(scale)


def free(scale: Scale) -> None:
    """Give memory that nothing uses back to the device, for whoever comes next."""
    if scale.device == "cuda":
        torch.cuda.empty_cache()


def twin(scale: Scale, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """transformers' model of the folder's config, with random weights of its own, made on the device."""
    with scale.torch_device:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype, **options)
    return model.eval()


@torch.no_grad()
def share_weights(decoder: Decoder, model: Any) -> None:
    """Copy tokenweave's weights (of one rank, all of them) into a transformers model of the same shape."""
    parameters = dict(model.named_parameters())
    for load in decoder.loads():
        parameters[load.name][load.index].copy_(load.into)


def prompt(scale: Scale, tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, scale.shape["vocab_size"], (tokens,), generator=generator).tolist()


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
