"""Peer: transformers with its own tensor parallelism."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from perf.overlap.points import Setting


class TransformersTP:
    """tp_plan="auto" under torchrun; logits of the last token only."""

    name = "transformers TP"

    def missing(self, setting: Setting) -> str:
        if setting.link == "paced":
            return "a paced link slows tokenweave's comm lane only; the real link measures both"
        if setting.ranks == 1:
            return "needs two ranks or more"
        if importlib.util.find_spec("accelerate") is None:
            return "accelerate is not installed: pip install accelerate"
        return ""

    def open(self, folder: Path, setting: Setting) -> Callable[[list[int]], Any]:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        parallel = DistributedConfig(tp_size=setting.ranks, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=parallel).eval()

        @torch.inference_mode()
        def prefill(ids: list[int]) -> torch.Tensor:
            return model(torch.tensor([ids], device=model.device), logits_to_keep=1).logits.argmax(-1)

        return prefill
