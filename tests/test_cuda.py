"""The same runtime on GPUs: one GPU against transformers, woven on two streams; several GPUs over NCCL."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import prompt_batch
from tests.reference import judge_greedy, relative_error, teacher_forced
from tests.runtime import watched_generate
from tokenweave import SamplingParams

CUDA_BOUND = 1e-3  # fp32 on a GPU sums in another order than on a CPU
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
LENGTHS = (1, 17, 200)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen2_window", "qwen3_moe", "olmo2", "gemma2"])
@pytest.mark.parametrize("overlap", ["off", "fused", "weave"])
def test_one_gpu_agrees_with_transformers(name, overlap, checkpoint):
    torch.backends.cuda.matmul.allow_tf32 = False
    options = {"device": "cuda", "dtype": "float32", "overlap": overlap, "num_kv_blocks": 64}
    agree(checkpoint(name), [watched_generate(checkpoint(name), prompt_batch(0, LENGTHS), GREEDY, options)])


@pytest.mark.multigpu
@pytest.mark.parametrize("overlap", ["off", "fused", "weave", "auto"])
def test_two_gpus_over_nccl_agree_with_transformers(overlap, checkpoint, ranks):
    options = {"device": "cuda", "dtype": "float32", "overlap": overlap, "num_kv_blocks": 64}
    folder = checkpoint("llama")
    agree(folder, ranks(2).run(watched_generate, folder, prompt_batch(0, LENGTHS), GREEDY, options))


def agree(folder, results) -> None:
    prompts = prompt_batch(0, LENGTHS)
    for result in results:
        assert result.tokens == results[0].tokens
    ours = results[0]
    judge_greedy(folder, prompts, ours.tokens, near_tie=10 * CUDA_BOUND).check()
    for prompt, tokens, logits in zip(prompts, ours.tokens, ours.logits, strict=True):
        reference = teacher_forced(folder, [*prompt, *tokens], prompt_length=len(prompt))
        assert relative_error(logits.cpu(), reference[len(prompt) - 1 : -1]).max() < CUDA_BOUND
