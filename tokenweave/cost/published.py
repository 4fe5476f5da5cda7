"""Published models of the supported families, by their sizes: known by name, without their config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenweave.cost.shape import LayerShape, ModelShape

# name: (layers, hidden, MLP, heads, KV heads, head size, vocabulary), from the models' config.json files on the hub
DENSE = {
    "Llama-2-7B": (32, 4096, 11008, 32, 32, 128, 32000),
    "Llama-2-13B": (40, 5120, 13824, 40, 40, 128, 32000),
    "Llama-2-70B": (80, 8192, 28672, 64, 8, 128, 32000),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256),
    "Llama-3.1-70B": (80, 8192, 28672, 64, 8, 128, 128256),
    "Llama-3.1-405B": (126, 16384, 53248, 128, 8, 128, 128256),
    "Llama-3.3-70B": (80, 8192, 28672, 64, 8, 128, 128256),
    "Mistral-7B-v0.3": (32, 4096, 14336, 32, 8, 128, 32768),
    "Mistral-Nemo-12B": (40, 5120, 14336, 32, 8, 128, 131072),
    "Mistral-Small-24B": (40, 5120, 32768, 32, 8, 128, 131072),
    "Mistral-Large-123B": (88, 12288, 28672, 96, 8, 128, 32768),
    "Qwen2.5-7B": (28, 3584, 18944, 28, 4, 128, 152064),
    "Qwen2.5-14B": (48, 5120, 13824, 40, 8, 128, 152064),
    "Qwen2.5-32B": (64, 5120, 27648, 40, 8, 128, 152064),
    "Qwen2.5-72B": (80, 8192, 29568, 64, 8, 128, 152064),
}
TIED = {  # the LM head is the embedding
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64, 128256),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128, 128256),
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 64, 151936),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 128, 151936),
    "Qwen2.5-3B": (36, 2048, 11008, 16, 2, 128, 151936),
}
QWEN3_TIED = {
    "Qwen3-0.6B": (28, 1024, 3072, 16, 8, 128, 151936),
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, 128, 151936),
    "Qwen3-4B": (36, 2560, 9728, 32, 8, 128, 151936),
}
QWEN3 = {
    "Qwen3-8B": (36, 4096, 12288, 32, 8, 128, 151936),
    "Qwen3-14B": (40, 5120, 17408, 40, 8, 128, 151936),
    "Qwen3-32B": (64, 5120, 25600, 64, 8, 128, 151936),
}
OLMO2 = {
    "OLMo-2-1B": (16, 2048, 8192, 16, 16, 128, 100352),
    "OLMo-2-7B": (32, 4096, 11008, 32, 32, 128, 100352),
    "OLMo-2-13B": (40, 5120, 13824, 40, 40, 128, 100352),
    "OLMo-2-32B": (64, 5120, 27648, 40, 8, 128, 100352),
}
GEMMA2 = {
    "Gemma-2-2B": (26, 2304, 9216, 8, 4, 256, 256000),
    "Gemma-2-9B": (42, 3584, 14336, 16, 8, 256, 256000),
    "Gemma-2-27B": (46, 4608, 36864, 32, 16, 128, 256000),
}
# and (experts, how many of them a token takes); the MLP is that of one expert
EXPERTS = {
    "Mixtral-8x7B": ((32, 4096, 14336, 32, 8, 128, 32000), 8, 2),
    "Mixtral-8x22B": ((56, 6144, 16384, 48, 8, 128, 32000), 8, 2),
}
QWEN3_EXPERTS = {
    "Qwen3-30B-A3B": ((48, 2048, 768, 32, 4, 128, 151936), 128, 8),
    "Qwen3-235B-A22B": ((94, 4096, 1536, 64, 4, 128, 151936), 128, 8),
}
# Tokens that a model was made for, by how its name begins: max_position_embeddings of the same files. These and the
# sizes above were checked on 2026-11-21 against github Lightning-AI/litgpt, litgpt/config.py at 26857050fe3f, which
# quotes each config.json by its address. Not there: Mistral-Nemo, Mistral-Small, OLMo-2-1B and 32B. Otherwise there:
# the vocabulary of Mixtral-8x22B, 32768, which is that of the instruct model.
MAX_LEN = {
    "Llama-2-": 4096,
    "Llama-3": 131072,
    "Mistral-7B": 32768,
    "Mistral-Small": 32768,  # from the model card of Mistral-Small-24B-Instruct-2501; its config.json was not seen
    "Mixtral-8x7B": 32768,
    "Mixtral-8x22B": 65536,
    # Of the instruct models: their cards ask for YaRN beyond. litgpt has 131072 for most, as the base models' files do.
    "Qwen2.5": 32768,
    "Qwen3": 40960,
    "OLMo-2": 4096,  # 1B and 32B: from github facebookresearch/fairseq2, models/olmo/config.py at 027bdebca4b9
    "Gemma-2": 8192,
}
# Not stated, since sources differ: Mistral-Nemo (1024000 in its config.json, 128k on its card), Mistral-Large (32768 in
# litgpt, 128k on its card).

Sizes = tuple[int, int, int, int, int, int, int]


def make(
    sizes: Sizes, *, windows: tuple[int | None, ...] = (None,), experts: int = 0, top_k: int = 0, **more: Any
) -> ModelShape:
    """windows: of the first layers; the others repeat them."""
    layers, hidden, mlp, heads, kv_heads, head_dim, vocabulary = sizes
    kinds = [LayerShape(window, mlp, experts, top_k) for window in windows]
    each = tuple(kinds[i % len(kinds)] for i in range(layers))
    return ModelShape(hidden, vocabulary, heads, kv_heads, head_dim, each, **more)


def max_len(name: str) -> int | None:
    return next((tokens for start, tokens in MAX_LEN.items() if name.startswith(start)), None)


SHAPES: dict[str, ModelShape] = {
    **{name: make(sizes) for name, sizes in DENSE.items()},
    **{name: make(sizes, tied=True) for name, sizes in TIED.items()},
    **{name: make(sizes, qk_norm="head") for name, sizes in QWEN3.items()},
    **{name: make(sizes, qk_norm="head", tied=True) for name, sizes in QWEN3_TIED.items()},
    **{name: make(sizes, qk_norm="all", post_norms=2) for name, sizes in OLMO2.items()},
    **{name: make(sizes, windows=(4096, None), post_norms=2, tied=True) for name, sizes in GEMMA2.items()},
    **{name: make(sizes, experts=count, top_k=k) for name, (sizes, count, k) in EXPERTS.items()},
    **{name: make(sizes, experts=count, top_k=k, qk_norm="head") for name, (sizes, count, k) in QWEN3_EXPERTS.items()},
}
PUBLISHED = {name: replace(shape, max_len=max_len(name)) for name, shape in SHAPES.items()}
