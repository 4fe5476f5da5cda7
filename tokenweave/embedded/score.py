"""How many held-out sums a folder's model gets right."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tokenweave.embedded.data import IGNORED, encode, labels_of
from tokenweave.embedded.problems import held_out_pairs


@torch.no_grad()
def exact_share(model: LlamaForCausalLM, pairs: list[tuple[int, int]], rows: int = 1024) -> float:
    """Share of pairs whose greedy answer, its end included, is right.

    Teacher forcing shows it in one pass: greedy decoding is right so far, and then sees the same tokens, or is wrong.
    """
    right = 0
    for ids in encode(pairs).split(rows):
        labels = labels_of(ids)
        said = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        right += int(((said == labels) | (labels == IGNORED)).all(1).sum())
    return right / len(pairs)


def report(folder: Path) -> str:
    """One line a dtype: the share of held-out sums that are right, with the weights as they lie in `folder`."""
    pairs = held_out_pairs()
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        lines.append(f"{dtype}: {exact_share(model, pairs):.4%} of {len(pairs)} held-out sums exact")
    return "\n".join(lines)
