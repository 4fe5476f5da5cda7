"""The fused kernel on several real GPUs: channels against the maths, and the runtime against its plain form."""

from __future__ import annotations

import os

import pytest
import torch

from perf.kernels.correctness import LAYERS, cases_of, check
from perf.kernels.ours import MULTIMEM, ONE_SHOT, TWO_SHOT, open_ours
from perf.kernels.problem import Problem
from tests.checkpoints import prompt_batch
from tests.reference import relative_error
from tests.runtime import watched_generate
from tokenweave import SamplingParams
from tokenweave.comm.group import join

pytestmark = pytest.mark.multigpu

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
LENGTHS = (1, 17, 200)
BOUND = 1e-3  # of fp32 logits: the kernel's norms sum in another order than torch's
ROWS = (1, 2, 5, 33, 300)
CTAS = (1, 2, 8, 64)
WORLD_SIZES = [size for size in (2, 3, 4, 8) if size <= max(2, torch.cuda.device_count())]


def checked(kernel: str, hidden_size: int, dtype: torch.dtype) -> str:
    """ "" if the kernel gives what it should, or why it cannot be used here."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    ranks = join(device, 60.0)
    problem = Problem(hidden_size, dtype, max(ROWS), device)
    try:
        opened = open_ours(ranks, problem, None)
        for ours in opened.usable:
            if ours.name == kernel:
                check(ours, cases_of(LAYERS, ROWS, CTAS), problem, ranks, lambda: None)
    finally:
        ranks.leave()
    return opened.missing.get(kernel, "")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kernel", [MULTIMEM, TWO_SHOT, ONE_SHOT])
@pytest.mark.parametrize(("hidden_size", "dtype"), [(64, torch.float32), (1032, torch.float16), (8192, torch.bfloat16)])
def test_channels_follow_the_maths(ranks, world_size, kernel, hidden_size, dtype):
    missing = ranks(world_size).run(checked, kernel, hidden_size, dtype, timeout_s=280.0)
    if missing[0]:
        pytest.skip(missing[0])


@pytest.mark.parametrize("comm", ["peer", "multimem"])
@pytest.mark.parametrize("overlap", ["fused", "weave"])
def test_two_gpus_generate_what_the_plain_form_does(ranks, checkpoint, comm, overlap):
    options = {"device": "cuda", "dtype": "float32", "overlap": overlap, "num_kv_blocks": 64}
    prompts, folder = prompt_batch(0, LENGTHS), checkpoint("llama")
    plain = ranks(2).run(watched_generate, folder, prompts, GREEDY, options | {"comm": "sharded"})
    fused = ranks(2).run(watched_generate, folder, prompts, GREEDY, options | {"comm": comm}, expect_errors=True)
    if "cannot be: " in getattr(fused[0], "message", ""):
        pytest.skip(fused[0].message)
    for result in fused:
        assert result.tokens == plain[0].tokens
    for ours, theirs in zip(fused[0].logits, plain[0].logits, strict=True):
        assert relative_error(ours.cpu(), theirs.cpu()).max() < BOUND
