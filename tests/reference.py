"""transformers as the judge: the same checkpoint, fp32, eager attention, every prompt alone and without padding.

Usage, with `folder` from the `checkpoint` fixture, and `prompts` and the runtime's tokens `ours` as lists of token
ids:

    logits = teacher_forced(folder, prompt + ours, prompt_length=len(prompt))      # [tokens, vocab], fp32
    assert relative_error(our_rows, logits[len(prompt) - 1 : -1]).max() < BOUND    # the rows that made `ours`

    report = judge_greedy(folder, prompts, ours_of_all_prompts)    # every token must be the reference's choice ...
    report.check()                                                 # ... or within 10 x BOUND of its best logit
    assert sum(reports, GreedyReport()).excluded_share < 0.01      # of many reports: one has too few steps for a share

`judge_greedy` teacher-forces transformers on our own text. So one near-tie, after which two correct texts differ for
good, costs one step and not the rest of the text; and it takes one forward per sequence instead of one per token.
`greedy` is the reference's own text, step by step. All results are kept on disk beside the checkpoint, so that the
many world sizes, overlaps and block sizes that are held against one reference compute it once; they go with the
session's temporary folder.

Dynamic rope is the exception: its frequencies depend on the longest position that a forward has seen, so one forward
over the whole text is not what decoding computes. There the prompt is one forward (hence `prompt_length`) and each
later token another.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BOUND = 1e-4  # of a row's largest |logit|: what teacher-forced logits may differ by
NEAR_TIE = 10 * BOUND  # top-2 gaps below this leave the choice open


@dataclass(frozen=True)
class WrongToken:
    """`ours` was new token `step` of sequence `sequence`; its logit is `gap` (relative) below the best."""

    sequence: int
    step: int
    ours: int
    expected: int
    gap: float


@dataclass(frozen=True)
class GreedyReport:
    """`steps` judged; `excluded` of them near-ties, where the reference's own top-2 gap leaves the choice open."""

    steps: int = 0
    excluded: int = 0
    wrong: tuple[WrongToken, ...] = ()

    def __add__(self, other: "GreedyReport") -> "GreedyReport":
        return GreedyReport(self.steps + other.steps, self.excluded + other.excluded, self.wrong + other.wrong)

    @property
    def excluded_share(self) -> float:
        return self.excluded / max(self.steps, 1)

    def check(self) -> None:
        """Raises AssertionError that names the first wrong tokens, if there are any or if nothing was judged."""
        assert self.steps > 0, "no greedy step was judged: pass at least one sequence with at least one new token"
        assert not self.wrong, f"{len(self.wrong)} of {self.steps} greedy tokens are wrong, first {self.wrong[:3]}"


@dataclass(frozen=True)
class GreedyText:
    """The reference's greedy continuation of one prompt, and at each new token its relative top-2 gap."""

    tokens: list[int]
    gaps: list[float]

    def excluded(self, near_tie: float = NEAR_TIE) -> list[int]:
        return [step for step, gap in enumerate(self.gaps) if gap < near_tie]


def teacher_forced(
    folder: Path, token_ids: Sequence[int], prompt_length: int | None = None, dtype: str = "float32"
) -> torch.Tensor:
    """Logits [len(token_ids), vocab] in fp32: row i is what follows token i. transformers computes in `dtype`."""
    prompt_length = (prompt_length or len(token_ids)) if _rope_type(folder) == "dynamic" else len(token_ids)
    key = ("logits", list(token_ids), prompt_length, dtype)
    return _cached(folder, key, lambda: _forced_logits(load_model(folder, dtype), token_ids, prompt_length))


def greedy(folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int, dtype: str = "float32") -> list[GreedyText]:
    """`new_tokens` argmax tokens after each prompt, one by one with transformers' KV cache; eos does not stop it."""

    def text(prompt: Sequence[int]) -> GreedyText:
        key = ("greedy", list(prompt), new_tokens, dtype)
        return GreedyText(*_cached(folder, key, lambda: _greedy_text(load_model(folder, dtype), prompt, new_tokens)))

    return [text(prompt) for prompt in prompts]


def judge_greedy(
    folder: Path, prompts: Sequence[Sequence[int]], ours: Sequence[Sequence[int]], near_tie: float = NEAR_TIE
) -> GreedyReport:
    """Holds the greedy tokens `ours[i]` after `prompts[i]` against the reference, teacher-forced on them."""
    report = GreedyReport()
    for sequence, (prompt, tokens) in enumerate(zip(prompts, ours, strict=True)):
        logits = teacher_forced(folder, [*prompt, *tokens], prompt_length=len(prompt))
        report += judge_rows(logits[len(prompt) - 1 : -1], tokens, near_tie, sequence)
    return report


def judge_rows(logits: torch.Tensor, tokens: Sequence[int], near_tie: float, sequence: int = 0) -> GreedyReport:
    """Row i of `logits` [steps, vocab] is the reference's before `tokens[i]`, which must be its argmax or nearly so."""
    top = logits.topk(2)
    scale = logits.abs().amax(-1)
    ours = logits.gather(-1, torch.tensor(tokens, dtype=torch.long)[:, None])[:, 0]
    shortfall = (top.values[:, 0] - ours) / scale
    excluded = int((relative_gaps(logits) < near_tie).sum())
    wrong = tuple(
        WrongToken(sequence, step, tokens[step], int(top.indices[step, 0]), float(shortfall[step]))
        for step in (shortfall >= near_tie).nonzero()[:, 0].tolist()
    )
    return GreedyReport(len(tokens), excluded, wrong)


def relative_gaps(logits: torch.Tensor) -> torch.Tensor:
    """Per row of [rows, vocab]: the best logit's lead over the second, relative to the largest |logit|."""
    best, second = logits.topk(2).values.unbind(-1)
    return (best - second) / logits.abs().amax(-1)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per row of [rows, vocab]: largest difference over the reference row's largest |logit|; infinity where NaN."""
    assert ours.shape == reference.shape, f"logits of shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    error = (ours.float() - reference).abs().amax(-1) / reference.abs().amax(-1)
    return error.nan_to_num(nan=float("inf"))


@functools.lru_cache(maxsize=2)
def load_model(folder: Path, dtype: str = "float32") -> Any:
    """The checkpoint as transformers loads it: eager attention (Gemma 2's soft cap needs it), eager experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def _forced_logits(model: Any, token_ids: Sequence[int], prompt_length: int) -> torch.Tensor:
    forward = _decoder(model)
    rows = [forward(token_ids[:prompt_length])]
    rows += [forward([token]) for token in token_ids[prompt_length:]]
    return torch.cat(rows)


@torch.inference_mode()
def _greedy_text(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
    forward = _decoder(model)
    rows = forward(prompt)[-1:]
    tokens, gaps = [], []
    for _ in range(new_tokens):
        tokens.append(int(rows.argmax()))
        gaps.append(float(relative_gaps(rows)))
        rows = forward(tokens[-1:])
    return tokens, gaps


def _decoder(model: Any) -> Callable[[Sequence[int]], torch.Tensor]:
    """Feeds tokens on a fresh KV cache; a call returns their logits [tokens, vocab] in fp32."""
    from transformers import DynamicCache

    model(torch.tensor([[0]]))  # a short text: dynamic rope keeps the frequencies of a long one until it sees one
    cache = DynamicCache(config=model.config)
    return lambda tokens: model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True).logits[0].float()


@functools.lru_cache(maxsize=64)
def _rope_type(folder: Path) -> str:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).rope_parameters["rope_type"]


def _cached(folder: Path, key: Any, compute: Callable[[], Any]) -> Any:
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = folder.parent / f"{folder.name}.reference" / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(compute(), unfinished)
        unfinished.rename(path)
    return torch.load(path, weights_only=True)
