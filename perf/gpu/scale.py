"""Scale: what is run. The real sizes on a GPU, or tiny ones that go through the same lines on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Scale:
    """Sizes in tokens and requests. decode_tokens are made after decode_context more; batches: sequences at a time."""

    name: str
    device: str
    dtype: str
    shape: dict[str, Any]
    matmul_size: int
    copy_bytes: int
    prefill_tokens: int
    decode_context: int
    decode_tokens: int
    batches: tuple[int, ...]
    requests: int
    prompt_tokens: tuple[int, int]  # of a mixed request: least, most
    output_tokens: tuple[int, int]
    step_tokens: tuple[int, ...]  # prompts that the cost model is held against
    contexts: tuple[int, ...]  # of rows that decode
    max_model_len: int
    rounds: int
    peer: dict[str, Any] = field(default_factory=dict)  # options of transformers' batching

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device, 0) if self.device == "cuda" else torch.device("cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


FULL = Scale(
    name="llama-8b",
    device="cuda",
    dtype="bfloat16",
    shape=LLAMA_8B,
    matmul_size=8192,
    copy_bytes=2 << 30,
    prefill_tokens=2048,
    decode_context=512,
    decode_tokens=64,
    batches=(1, 64),
    requests=64,
    prompt_tokens=(64, 1024),
    output_tokens=(32, 256),
    step_tokens=(128, 512, 1024, 2048, 4096, 8192),
    contexts=(256, 2048),
    max_model_len=8192,
    rounds=5,
)
TINY = Scale(
    name="llama-tiny",
    device="cpu",
    dtype="bfloat16",
    shape=LLAMA_TINY,
    matmul_size=64,
    copy_bytes=1 << 16,
    prefill_tokens=64,
    decode_context=16,
    decode_tokens=4,
    batches=(1, 4),
    requests=4,
    prompt_tokens=(4, 16),
    output_tokens=(2, 6),
    step_tokens=(16, 64),
    contexts=(16,),
    max_model_len=128,
    rounds=1,
    peer={"num_blocks": 8, "max_batch_tokens": 64},  # on a CPU it would take most of the memory
)
