"""Equality: our greedy tokens against transformers' model of the same weights in fp32, within what bf16 can tell.

A logit of ours may be off by 1.5 times as much as transformers' own bf16 logits are, so the reference's favourite may
lose to a token that is less than twice that below it. Wherever the reference is surer, ours must be its token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perf.gpu.figure import Figure
from perf.gpu.model import config_folder, free, greedy, opened, prompt, share_weights, twin
from perf.gpu.scale import Scale

ALLOWED = 1.5  # times transformers' own error, as tests/test_bfloat16.py has it
CONTENDERS = 8  # tokens nearest to the top, whose logits count
KV_BLOCKS = 512


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    lengths = (scale.prompt_tokens[0], scale.prompt_tokens[1])
    prompts = [prompt(scale, length, seed) for seed, length in enumerate(lengths)]
    with config_folder(scale) as folder, opened(scale, folder, num_kv_blocks=KV_BLOCKS) as llm:
        outputs = llm.generate(prompts, greedy(scale.decode_tokens))
        texts = [(ids, list(output.outputs[0].token_ids)) for ids, output in zip(prompts, outputs, strict=True)]
        model = twin(scale, folder, torch.float32)
        share_weights(llm._runner.model, model)
        exact = torch.cat([logits_of(model, *text) for text in texts])
        rounded = torch.cat([logits_of(model.to(scale.torch_dtype), *text) for text in texts])
        del model
    free(scale)
    ours = torch.tensor([token for _, tokens in texts for token in tokens], device=exact.device)
    for figure in judged(exact, rounded, ours):
        say(figure)


@torch.inference_mode()
def logits_of(model: Any, ids: list[int], tokens: list[int]) -> Tensor:
    """[tokens, vocabulary] fp32: what the model makes of the prompt and of our tokens up to each position."""
    given = torch.tensor([[*ids, *tokens]], device=model.device)
    return model(given, logits_to_keep=len(tokens) + 1).logits[0, :-1].float()


def judged(exact: Tensor, rounded: Tensor, ours: Tensor) -> list[Figure]:
    """exact, rounded: the reference's logits in fp32 and in bf16, [positions, vocabulary]; ours: [positions]."""
    top, contenders = exact.topk(CONTENDERS)
    error = float((rounded.gather(1, contenders) - top).abs().max())
    bound = 2 * ALLOWED * error
    behind = top[:, 0] - exact.gather(1, ours[:, None])[:, 0]  # how much less likely our token is: 0 where they agree
    sure = top[:, 0] - top[:, 1] > bound
    right = behind <= bound
    return [
        Figure("greedy tokens equal to transformers in fp32, within bf16's bound", share(right), "of positions", 1.0),
        Figure("the same token", share(behind == 0), "of positions"),
        Figure("positions where the reference's lead exceeds the bound", share(sure), "of positions"),
        Figure("largest error of transformers' bf16 near the top", error, "logits"),
    ]


def share(positions: Tensor) -> float:
    return float(positions.float().mean())
