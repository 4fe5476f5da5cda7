"""Experts: a mixture-of-experts block, every expert's intermediate width cut over the ranks as an Mlp's is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenweave.models.layers import Place, as_slice, gated_function, linear
from tokenweave.models.spec import ExpertsSpec
from tokenweave.models.weights import Load, Where


class Experts:
    """sum over the token's top-k experts e of weight_e * down_e(act(gate_e(x)) * up_e(x)).

    Weights are the softmax over all experts' router logits, renormalised over the top k where the model says so.
    Every rank routes all tokens of a half, once; the router is small and replicated.
    """

    bias = None

    def __init__(self, place: Place, hidden_size: int, spec: ExpertsSpec, activation: str):
        self.spec = spec
        self.activation = activation
        self.gated = gated_function(activation, place.device)
        self.owned = place.share(spec.intermediate_size)
        self.router = place.empty(spec.count, hidden_size)
        self.gate_up = place.empty(spec.count, 2 * len(self.owned), hidden_size)
        self.down = place.empty(spec.count, hidden_size, len(self.owned))

    def __call__(self, x: Tensor, half: Any) -> Tensor:
        """x: [tokens, hidden]; returns the partial [tokens, hidden]."""
        weights, chosen = self.route(x)
        out = half.partial(len(x))
        if x.is_cuda:
            return self.all_at_once(x, chosen, weights, out)
        return out.copy_(self.one_by_one(x, chosen, weights))

    def all_at_once(self, x: Tensor, chosen: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        """One launch for all experts, in Triton; the host does not learn which were chosen."""
        from tokenweave.kernels.activation import KINDS
        from tokenweave.kernels.grouped_gemm import run_experts

        return run_experts(x, chosen, weights, self.gate_up, self.down, KINDS[self.activation], out)

    def one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """fp32 [tokens, hidden]."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(self.spec.count):
            token, place = torch.where(chosen == expert)
            if len(token):
                got = self.expert(expert, x.index_select(0, token)).float()
                total.index_add_(0, token, got.mul_(weights[token, place, None]))
        return total

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights fp32, experts), each [tokens, top_k]."""
        logits = linear(x, self.router)
        if x.is_cuda:
            from tokenweave.kernels.expert_choice import choose_experts

            return choose_experts(logits, self.spec.top_k, self.spec.renormalise)
        weights, chosen = logits.float().softmax(-1).topk(self.spec.top_k, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if self.spec.renormalise else weights), chosen

    def expert(self, expert: int, x: Tensor) -> Tensor:
        return linear(self.gated(linear(x, self.gate_up[expert])), self.down[expert])

    def loads(self, prefix: str) -> Iterator[Load]:
        """Per-expert tensors as hub checkpoints hold them, or transformers' fused layout."""
        rows, width, fused = as_slice(self.owned), len(self.owned), f"{prefix}.mlp.experts"
        count, inner, hidden = self.spec.count, self.spec.intermediate_size, self.router.shape[1]
        up_rows = slice(rows.start + inner, rows.stop + inner)
        router, up_gate, down = (count, hidden), (count, 2 * inner, hidden), (count, hidden, inner)
        either: tuple[Where, ...] = ((f"{prefix}.mlp.gate.weight", (), router),)
        yield Load(self.router, f"{prefix}.{self.spec.router}.weight", (), either, shape=router)
        for e in range(count):
            name = f"{prefix}.{self.spec.expert.format(e=e)}"
            for into, own, index in (
                (self.gate_up[e, :width], self.spec.gate, rows),
                (self.gate_up[e, width:], self.spec.up, up_rows),
            ):
                either = ((f"{fused}.gate_up_proj", (e, index), up_gate),)
                yield Load(into, f"{name}.{own}.weight", (rows,), either, shape=(inner, hidden))
            columns = (slice(None), rows)
            either = ((f"{fused}.down_proj", (e, *columns), down),)
            yield Load(self.down[e], f"{name}.{self.spec.down}.weight", columns, either, shape=(hidden, inner))
