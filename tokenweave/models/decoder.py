"""The strand: a decoder's forward pass over one half, written once and straight down for every architecture."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from tokenweave.kernels.triton_needed import check_triton
from tokenweave.models.attention import Options
from tokenweave.models.experts import Experts
from tokenweave.models.layers import ColumnLinear, Mlp, Place, RowLinear, Vocabulary, as_slice
from tokenweave.models.rope import Rope
from tokenweave.models.spec import DecoderSpec, check_world_size
from tokenweave.models.weights import Load
from tokenweave.weave.request import Gather, Norm, Reduce, Request, Rows

Steps = Generator[Request, Any, Tensor]


class Decoder:
    """This rank's part of the model. `strand` runs it, `loads` says what to read into it."""

    def __init__(self, spec: DecoderSpec, config: Any, max_model_len: int, place: Place):
        check_world_size(spec, place.world_size)
        check_triton(place.device)
        self.spec = spec
        self.rope = Rope(spec, config, max_model_len, place.device)
        self.embedding = Vocabulary(place, spec.vocab_size, spec.hidden_size)
        self.head = self.embedding if spec.tied else Vocabulary(place, spec.vocab_size, spec.hidden_size)
        self.layers = [Layer(spec, i, place) for i in range(spec.num_layers)]
        self.norm = empty_norm(spec, place, spec.hidden_size)

    def strand(self, half: Any) -> Steps:
        """Yields what ranks must sum; returns the logits [half.logits_rows, vocabulary] fp32, on every rank."""
        rotary = self.rope(half)
        hidden = yield Reduce(self.embed(half), norm=self.layers[0].attn_in, site="embed")
        for layer, next_norm, rows in self.schedule(half):
            attended = yield from layer.attention(hidden.data, half, rotary, rows)
            hidden = yield Reduce(
                attended, layer.attention.out.bias, layer.attn_out, norm=layer.mlp_in, rows=rows, site="attn"
            )
            hidden = yield Reduce(
                layer.mlp(hidden.data, half), layer.mlp.bias, layer.mlp_out, norm=next_norm, site="mlp"
            )
        alive = hidden.data if half.alive_rows is not None else hidden.data.index_select(0, half.logits_rows.index)
        logits = yield Gather(self.head.logits(alive), self.head.widths, site="head")
        return self.capped(logits.float())

    def schedule(self, half: Any) -> Iterator[tuple[Layer, Norm | None, Rows | None]]:
        """Every layer, the norm that follows it, and the rows that alone go on from its attention (last layer)."""
        for layer, following in zip(self.layers, self.layers[1:], strict=False):
            yield layer, following.attn_in, None
        yield self.layers[-1], self.norm, half.alive_rows

    def embed(self, half: Any) -> Tensor:
        partial = self.embedding.embed(half.token_ids, half.partial(len(half.token_ids)))
        if self.spec.embed_scale is not None:
            partial.mul_(torch.tensor(self.spec.embed_scale, dtype=partial.dtype))
        return partial

    def capped(self, logits: Tensor) -> Tensor:
        cap = self.spec.logits_softcap
        return logits if cap is None else (logits / cap).tanh_().mul_(cap)

    def loads(self) -> Iterator[Load]:
        yield from self.embedding.loads("model.embed_tokens.weight")
        if not self.spec.tied:
            yield from self.head.loads("lm_head.weight")
        yield Load(self.norm.weight, "model.norm.weight")
        for i, layer in enumerate(self.layers):
            yield from layer.loads(f"model.layers.{i}")


class Layer:
    """One transformer layer: attention, a dense or mixture-of-experts MLP, and up to four norms around them."""

    def __init__(self, spec: DecoderSpec, index: int, place: Place):
        self.names = spec.norms
        self.attention = Attention(spec, index, place)
        experts = spec.experts_of(index)
        self.mlp: Mlp | Experts
        if experts is None:
            self.mlp = Mlp(place, spec.hidden_size, spec.intermediate_size, spec.activation, spec.mlp_bias)
        else:
            self.mlp = Experts(place, spec.hidden_size, experts, spec.activation)
        present = (self.names.attn_in, self.names.attn_out, self.names.mlp_in, self.names.mlp_out)
        norms = [None if name is None else empty_norm(spec, place, spec.hidden_size) for name in present]
        self.attn_in, self.attn_out, self.mlp_in, self.mlp_out = norms

    def loads(self, prefix: str) -> Iterator[Load]:
        yield from self.attention.loads(f"{prefix}.self_attn")
        yield from self.mlp.loads(prefix)
        for at in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
            if (norm := getattr(self, at)) is not None:
                yield Load(norm.weight, f"{prefix}.{getattr(self.names, at)}.weight")


class Attention:
    """This rank's heads: q, k, v in one GEMM, norms of q and k where the model has them, rotation, cache, output."""

    def __init__(self, spec: DecoderSpec, index: int, place: Place):
        self.index = index
        self.spec = spec
        self.options = Options(spec.scale, spec.window(index), spec.attention_softcap)
        self.heads = place.share(spec.num_heads)
        self.kv_heads = kv_share(spec.num_kv_heads, place)
        self.world_size = place.world_size
        q, kv = (range(r.start * spec.head_dim, r.stop * spec.head_dim) for r in (self.heads, self.kv_heads))
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = [("q_proj", q, q_size), ("k_proj", kv, kv_size), ("v_proj", kv, kv_size)]
        self.qkv = ColumnLinear(place, spec.hidden_size, parts, spec.qkv_bias)
        self.out = RowLinear(place, "o_proj", q, q_size, spec.hidden_size, spec.attn_out_bias)
        one_head = (range(spec.head_dim), spec.head_dim)
        self.normed = {None: (), "head": (one_head, one_head), "all": ((q, q_size), (kv, kv_size))}[spec.qk_norm]
        if self.normed:
            self.q_norm, self.k_norm = (empty_norm(spec, place, len(owned)) for owned, _ in self.normed)

    def __call__(self, x: Tensor, half: Any, rotary: tuple[Tensor, Tensor], rows: Rows | None) -> Steps:
        """x: [tokens, hidden]; returns the partial [tokens, hidden], or of `rows` alone where they are given."""
        heads = len(self.heads) + len(self.kv_heads)
        qkv = self.qkv(x).view(len(x), -1, self.spec.head_dim)
        qk, v = qkv[:, :heads], qkv[:, heads:]
        if self.spec.qk_norm == "all":
            qk = yield from self.norm_all(qk)
        norms = (self.q_norm, self.k_norm) if self.spec.qk_norm == "head" else None
        attended = half.attention(self.index, qk, v, rotary, self.options, rows, norms)
        return self.out(attended, half.partial(len(attended)))

    def norm_all(self, qk: Tensor) -> Steps:
        """RMSNorm over all ranks' heads of q, and of k: two numbers a token cross the wire, not the heads."""
        wide = qk.float()
        q, k = wide[:, : len(self.heads)].flatten(1), wide[:, len(self.heads) :].flatten(1)
        squares = torch.stack((q.square().sum(-1), k.square().sum(-1)), dim=-1)
        everyone = yield Gather(squares, (2,) * self.world_size, site="qk_norm")
        total = everyone.view(len(qk), self.world_size, 2).sum(1)
        copies = max(1, self.world_size // self.spec.num_kv_heads)  # ranks that hold the same KV head
        q_size, k_size = (n * self.spec.head_dim for n in (self.spec.num_heads, self.spec.num_kv_heads * copies))
        q = q * torch.rsqrt(total[:, :1] / q_size + self.q_norm.eps) * self.q_norm.weight.float()
        k = k * torch.rsqrt(total[:, 1:] / k_size + self.k_norm.eps) * self.k_norm.weight.float()
        return torch.cat((q, k), dim=1).view(qk.shape).to(qk.dtype)

    def loads(self, prefix: str) -> Iterator[Load]:
        yield from self.qkv.loads(prefix)
        yield from self.out.loads(prefix)
        if self.normed:
            for norm, name, (owned, total) in zip((self.q_norm, self.k_norm), "qk", self.normed, strict=True):
                yield Load(norm.weight, f"{prefix}.{name}_norm.weight", (as_slice(owned),), shape=(total,))


def kv_share(num_kv_heads: int, place: Place) -> range:
    """This rank's KV heads: an even part of them, or one that several ranks hold."""
    if num_kv_heads >= place.world_size:
        return place.share(num_kv_heads)
    head = place.rank * num_kv_heads // place.world_size
    return range(head, head + 1)


def empty_norm(spec: DecoderSpec, place: Place, size: int) -> Norm:
    return Norm(place.empty(size), spec.norm_eps, spec.norm_offset)
