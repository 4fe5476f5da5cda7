"""Peer: transformers, over several ranks with its own tensor parallelism."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perf.overlap.peers.opened import Opened
from perf.overlap.points import Setting
from perf.overlap.workloads import Arrival
from perf.shapes import VOCAB_SIZE, prompt


class TransformersTP:
    """tp_plan="auto" under torchrun; logits of the last token only."""

    name = "transformers TP"

    def missing(self, setting: Setting, load_format: str) -> str:
        if load_format == "dummy":
            return "it reads weights, and this model has none"
        if setting.link == "paced":
            return "a paced link slows tokenweave's comm lane only; the real link measures both"
        if setting.ranks > 1 and importlib.util.find_spec("accelerate") is None:
            return "accelerate is not installed: pip install accelerate"
        return ""

    def open(self, folder: Path, setting: Setting, load_format: str) -> Opened:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        dtype = torch.float32 if setting.device == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **placed(setting)).eval()
        return Opened(Prefill(model), lambda sequences, context: Decode(model, sequences, context), Generate(model))


def placed(setting: Setting) -> dict[str, Any]:
    """Over the ranks, or on this one's device."""
    if setting.ranks == 1:
        return {"device_map": setting.device} if setting.device == "cuda" else {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=setting.ranks, tp_plan="auto")}


def vocab_size(model: Any) -> int:
    return min(VOCAB_SIZE, model.config.vocab_size)


class Prefill:
    def __init__(self, model: Any):
        self.model = model

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> list[int]:
        ids_ = torch.tensor([ids], device=self.model.device)
        return self.model(ids_, logits_to_keep=1).logits.argmax(-1)[:, -1].tolist()


class Decode:
    """Each call adds a token to the same cache, and takes it away again."""

    @torch.inference_mode()
    def __init__(self, model: Any, sequences: int, context: int):
        self.model = model
        ids = torch.tensor([prompt(context, vocab_size=vocab_size(model))] * sequences, device=model.device)
        self.cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        self.next = ids[:, :1]

    @torch.inference_mode()
    def __call__(self) -> list[int]:
        logits = self.model(self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.cache.crop(-1)
        return logits.argmax(-1)[:, -1].tolist()


class Generate:
    """All requests as one left-padded batch, until the longest ends: what `generate` does with them."""

    def __init__(self, model: Any):
        self.model = model

    @torch.inference_mode()
    def __call__(self, arrivals: list[Arrival]) -> Tensor:
        longest, new_tokens = max(one.prompt for one in arrivals), max(one.output for one in arrivals)
        prompts = [prompt(one.prompt, number, vocab_size(self.model)) for number, one in enumerate(arrivals)]
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=ids.device)
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        return self.model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
