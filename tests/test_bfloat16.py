"""bfloat16 is as good as transformers' own: the error against fp32 is at most 1.5 times its, on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.checkpoints import ARCHITECTURES, prompt_batch
from tests.reference import teacher_forced
from tokenweave import LLM
from tokenweave.engine.batch import Batch, Span
from tokenweave.weave.plan import plan_step

BOUND = 1.5
OVERLAPS = ("off", "fused", "weave")
WORLD_SIZES = (1, 2, 4)
LENGTHS = (280, 64, 17, 2)
BLOCK_SIZE = 16
# Of a row whose rounding sends it to another expert than in fp32, nothing can be said but that it is wrong: on either
# side such a row counts this much. No row of a dense model comes near.
MOST = 0.25


def forced_logits(folder: Path, prompts: Sequence[Sequence[int]], dtype: str) -> dict[str, torch.Tensor]:
    """Runs on every rank: by overlap, the logits of all rows of all prompts, [rows, vocab].

    A batch of their beginnings, one of what follows, and one of their last tokens, which are decoded.
    """
    options = {"dtype": dtype, "block_size": BLOCK_SIZE, "num_kv_blocks": 64, "progress": False, "overlap": "off"}
    with LLM(folder, **options) as llm:
        return {overlap: in_three_steps(llm, prompts, overlap) for overlap in OVERLAPS}


def in_three_steps(llm: LLM, prompts: Sequence[Sequence[int]], overlap: str) -> torch.Tensor:
    llm._runner.storage.fill_(float("nan"))
    steps: list[list[torch.Tensor]] = []
    for part in range(3):
        batch = part_of(prompts, part)
        logits = llm._runner.forward(batch, plan_step(overlap, batch.rows, None))
        steps.append(list(logits.split([len(span) for span in batch.spans])))
    return torch.cat([rows for of_prompt in zip(*steps, strict=True) for rows in of_prompt])


def part_of(prompts: Sequence[Sequence[int]], part: int) -> Batch:
    """Of every prompt the first part, the second, or the last token; all rows make logits."""
    spans, first_block = [], 0
    for prompt in prompts:
        cuts = (0, len(prompt) // 2, len(prompt) - 1, len(prompt))
        blocks = tuple(range(first_block, first_block + -(-len(prompt) // BLOCK_SIZE)))
        tokens = tuple(prompt[cuts[part] : cuts[part + 1]])
        spans.append(Span(tokens, cuts[part], blocks, len(prompt), wanted=len(tokens)))
        first_block += len(blocks)
    return Batch(tuple(spans))


def relative_errors(logits: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Per row of [rows, vocab]: the rms of the difference over that of the exact row."""
    errors = (logits.float() - exact).square().mean(-1).sqrt() / exact.square().mean(-1).sqrt()
    assert not errors.isnan().any()
    return errors.clamp_max(MOST)


def summaries(errors: torch.Tensor) -> dict[str, float]:
    """Over rows. Not the maximum, which is chance."""
    return {"median": float(errors.median()), "rms": float(errors.square().mean().sqrt())}


CASES = [(name, size) for name, one in ARCHITECTURES.items() for size in WORLD_SIZES if one.fits(size)]


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_error_against_fp32(name, world_size, ranks, checkpoint):
    folder, prompts = checkpoint(name, dtype="bfloat16"), prompt_batch(3, LENGTHS)
    exact = torch.cat([teacher_forced(folder, prompt) for prompt in prompts])
    theirs = torch.cat([teacher_forced(folder, prompt, dtype="bfloat16") for prompt in prompts])
    allowed = {of: BOUND * error for of, error in summaries(relative_errors(theirs, exact)).items()}
    results = ranks(world_size).run(forced_logits, folder, prompts, "bfloat16")
    for overlap, logits in results[0].items():
        check(summaries(relative_errors(logits, exact)), allowed, overlap)
        assert all(torch.equal(other[overlap], logits) for other in results[1:])


def check(errors: Mapping[str, float], allowed: Mapping[str, float], overlap: str) -> None:
    for of, error in errors.items():
        assert error <= allowed[of], f"{overlap}: the {of} of errors is {error:.4f}, more than {allowed[of]:.4f}"


def test_the_same_steps_in_fp32_are_exact(ranks, checkpoint):
    """So that what is measured above is bfloat16, and not this way of measuring."""
    folder, prompts = checkpoint("llama"), prompt_batch(3, LENGTHS)
    exact = torch.cat([teacher_forced(folder, prompt) for prompt in prompts])
    for logits in ranks(2).run(forced_logits, folder, prompts, "float32")[0].values():
        assert relative_errors(logits, exact).max() < 1e-4
