"""The embedded model adds: held-out sums, through the runtime, on two ranks, woven."""

from __future__ import annotations

import random

from safetensors import safe_open
from transformers import AutoTokenizer

from tokenweave import LLM, SamplingParams, embedded
from tokenweave.embedded.problems import answer, held_out, held_out_pairs, prompt

SUMS = 1000


def added(pairs: list[tuple[int, int]]) -> list[tuple[str, str | None]]:
    """Runs on every rank: each sum's text, and why it ended."""
    with LLM(embedded.path(), overlap="weave", progress=False) as llm:
        outputs = llm.generate([prompt(a, b) for a, b in pairs], SamplingParams(temperature=0.0, max_tokens=8))
    return [(output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]


def test_held_out_sums_are_exact_on_two_woven_ranks(ranks):
    pairs = random.Random(0).sample(sorted(held_out_pairs()), SUMS)
    assert all(held_out(a, b) for a, b in pairs)
    one, other = ranks(2).run(added, pairs)
    assert one == other
    exact = sum(result == (answer(a, b), "stop") for (a, b), result in zip(pairs, one, strict=True))
    print(f"{exact} of {SUMS} held-out sums exact")
    assert exact >= 0.98 * SUMS


def test_the_example_of_the_readme(ranks):
    assert ranks(2).run(added, [(12, 34)]) == [[("46", "stop")]] * 2


def test_it_is_small_and_its_tokenizer_loads():
    folder = embedded.path()
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) <= 6 << 20
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        parameters = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert 1e6 <= parameters <= 3e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("12+34=46"), skip_special_tokens=True) == "12+34=46"
