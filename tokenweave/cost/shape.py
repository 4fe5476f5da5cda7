"""ModelShape: a decoder as sizes alone, and what of it one of W ranks holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tokenweave.models.registry import ARCHITECTURES, read_config, read_spec, supported
from tokenweave.models.spec import DecoderSpec, check_world_size, longest

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True)
class LayerShape:
    """One layer: the window of its attention, and its MLP, dense (experts == 0) or of experts."""

    window: int | None
    intermediate_size: int
    experts: int = 0
    top_k: int = 0


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer in elements of the whole model; `layers` one record a layer."""

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerShape, ...]
    qk_norm: str | None = None  # None | "head" | "all"
    post_norms: int = 0  # norms a layer has after its blocks, before the residual
    tied: bool = False
    dtype: str = "bfloat16"
    max_len: int | None = field(default=None, compare=False)  # tokens it was made for; None: not known. No size

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class RankShape:
    """What the fullest rank of W holds: sizes as the models shard them (KV heads replicated where W exceeds them)."""

    heads: int
    kv_heads: int
    intermediate_sizes: tuple[int, ...]  # per layer; of one expert where the layer has experts
    vocab_size: int

    @property
    def qkv_heads(self) -> int:
        return self.heads + 2 * self.kv_heads


def shard_shape(shape: ModelShape, world_size: int) -> RankShape:
    """Raises ValueError naming the world sizes that fit, where the heads cannot be shared evenly."""
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
        raise ValueError(f"world_size must be a whole number >= 1, got {world_size!r}")
    check_world_size(cast(DecoderSpec, shape), world_size)  # which looks at the head counts alone
    return RankShape(
        heads=shape.num_heads // world_size,
        kv_heads=max(1, shape.num_kv_heads // world_size),
        intermediate_sizes=tuple(-(-layer.intermediate_size // world_size) for layer in shape.layers),
        vocab_size=-(-shape.vocab_size // world_size),
    )


def shape_of_spec(spec: DecoderSpec, dtype: str = "bfloat16") -> ModelShape:
    """The sizes of a spec."""
    return ModelShape(
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        layers=tuple(_layer(spec, i) for i in range(spec.num_layers)),
        qk_norm=spec.qk_norm,
        post_norms=(spec.norms.attn_out is not None) + (spec.norms.mlp_out is not None),
        tied=spec.tied,
        dtype=dtype,
        max_len=longest(spec),
    )


def read_shape(config: Any, dtype: str | None = None) -> ModelShape:
    """The sizes of a transformers config, of a dict that holds what config.json does, of a path to config.json or its
    folder, or of a ModelShape itself.

    dtype: None = what the config states, bfloat16 where it states none.
    Raises FileNotFoundError or ValueError, in one line: no such file, broken JSON, an architecture not supported.
    """
    if isinstance(config, ModelShape):
        return config
    folder = Path("<config>")
    if isinstance(config, (str, Path)):
        path = Path(config).expanduser()
        folder = path.parent if path.name == "config.json" else path
        config = read_config(folder)
    elif isinstance(config, Mapping):
        config = _config_of(config)
    return shape_of_spec(_spec(folder, config), dtype or _dtype(config))


def _config_of(values: Mapping[str, Any]) -> Any:
    """A transformers config. Raises ValueError for a model type that is missing or unknown, and for bad values."""
    from transformers import CONFIG_MAPPING  # here: it takes seconds

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"a config given as a dict must name a known 'model_type', as config.json does; got {kind!r}; {supported()}"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(values))
    except Exception as error:  # transformers raises many kinds for what it cannot use
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the config given as a dict cannot be used: {reason}; {supported()}") from error


def _spec(folder: Path, config: Any) -> DecoderSpec:
    """A config made in Python names no architecture; its model type then does."""
    if getattr(config, "architectures", None):
        return read_spec(folder, config)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # here: it imports torch

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(config, "model_type", ""))
    return ARCHITECTURES[architecture](config) if architecture in ARCHITECTURES else read_spec(folder, config)


def _dtype(config: Any) -> str:
    name = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"the config's dtype {name!r} is not known; known: {', '.join(DTYPE_BYTES)}")
    return name


def _layer(spec: DecoderSpec, index: int) -> LayerShape:
    experts = spec.experts_of(index)
    if experts is None:
        return LayerShape(spec.window(index), spec.intermediate_size)
    return LayerShape(spec.window(index), experts.intermediate_size, experts.count, experts.top_k)
