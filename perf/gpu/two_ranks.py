"""Two ranks on one GPU: the runner of each is a thread, and their sums are one launch of the `peer` kernel for both.

Greedy tokens of woven batches against those of unsplit ones: GEMMs of other row counts may round otherwise, so where
they part, the two tokens must have been nearly equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from perf.gpu.figure import Figure
from perf.gpu.model import config_folder, free, prompt
from perf.gpu.scale import Scale
from perf.gpu.threads import Meeting, ThreadRanks, close_all, fused_communicators, on_threads, plain_communicators
from perf.lone import open_runner
from tokenweave.comm.symmetric import Layout
from tokenweave.config import EngineConfig
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.runner import Runner
from tokenweave.weave.plan import Plan

WORLD_SIZE = 2
TIMEOUT_S = 60.0
NEAR_TIE = 0.25  # logits, of a standard deviation of 3: what bf16 rounding moves them by, and some
MODES = {"unsplit": False, "woven": True}


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    device = scale.torch_device
    baton = threading.Lock() if device.type == "cuda" else None
    meetings = [Meeting(WORLD_SIZE, TIMEOUT_S, baton) for _ in range(2)]  # of the ranks' threads, and their comm lanes'
    with config_folder(scale) as folder:
        runners = open_runners(scale, folder, meetings)
        try:
            made = {mode: both_ranks(scale, runners, meetings, split) for mode, split in MODES.items()}
        finally:
            close_all(runners)
        del runners
    free(scale)
    for figure in compared(made["unsplit"], made["woven"], "peer kernel" if device.type == "cuda" else "threads"):
        say(figure)


def open_runners(scale: Scale, folder: Path, meetings: list[Meeting]) -> list[Runner]:
    """Opened one after the other, so that residuals lie in rank order; what they gather is the same on all."""
    device, blocks = scale.torch_device, blocks_of(scale) * len(prompts_of(scale))
    config = EngineConfig(
        str(folder), device=scale.device, dtype=scale.dtype, load_format="dummy", num_kv_blocks=blocks,
        max_num_batched_tokens=rows_of(scale), max_model_len=scale.max_model_len, progress=False, timeout_s=TIMEOUT_S,
        enforce_eager=True,  # a graph captures one thread's launches, and these are made by two
    )  # fmt: skip
    layout = Layout(rows_of(scale), scale.shape["hidden_size"], scale.torch_dtype)
    make = fused_communicators if device.type == "cuda" else plain_communicators
    communicators = make(layout, device, meetings[1], TIMEOUT_S)

    def opened(rank: int) -> Runner:
        ranks = ThreadRanks(rank, meetings[0], device, TIMEOUT_S)
        runner = open_runner(config, ranks, lambda _: communicators[rank])
        runner.transport = communicators[rank].transport
        return runner

    return on_threads(WORLD_SIZE, device, meetings, opened)


def both_ranks(
    scale: Scale, runners: list[Runner], meetings: list[Meeting], split: bool
) -> list[tuple[Tensor, Tensor]]:
    """Of each rank: tokens [sequences, steps], and the logits that made them [steps, sequences, vocabulary]."""
    prompts = prompts_of(scale)
    run = lambda rank: completed(runners[rank], prompts, scale.decode_tokens, split)  # noqa: E731
    found = on_threads(WORLD_SIZE, scale.torch_device, meetings, run)
    if not torch.equal(found[0][0], found[1][0]):
        raise AssertionError("the ranks' tokens differ")
    return found


def completed(runner: Runner, prompts: list[list[int]], steps: int, split: bool) -> tuple[Tensor, Tensor]:
    """All prompts in one step, then one token of each a step."""
    size = runner.config.block_size
    most = -(-(max(map(len, prompts)) + steps) // size)
    tables = [tuple(range(i * most, (i + 1) * most)) for i in range(len(prompts))]
    spans = [Span(tuple(ids), 0, table, len(ids), 1) for ids, table in zip(prompts, tables, strict=True)]
    tokens, logits = [], []
    for step in range(steps):
        batch = Batch(tuple(spans))
        made = runner.forward(batch, plan_of(batch.rows, split))
        runner.synchronize()
        tokens.append(made.argmax(-1).cpu())
        logits.append(made.cpu())
        spans = [
            Span((int(token),), len(ids) + step, table, len(ids), 1)
            for token, ids, table in zip(tokens[-1], prompts, tables, strict=True)
        ]
    return torch.stack(tokens, dim=1), torch.stack(logits)


def plan_of(rows: int, split: bool) -> Plan:
    return Plan(rows, rows // 2 if split and rows > 1 else None, "sharded", attention_sms=4, mlp_sms=4)


def prompts_of(scale: Scale) -> list[list[int]]:
    least, most = scale.prompt_tokens
    return [prompt(scale, length, seed) for seed, length in enumerate((least, (least + most) // 2, most))]


def rows_of(scale: Scale) -> int:
    return sum(map(len, prompts_of(scale)))


def blocks_of(scale: Scale) -> int:
    """KV blocks of the longest sequence."""
    return -(-(scale.prompt_tokens[1] + scale.decode_tokens) // 16) + 1


def compared(unsplit: list[tuple[Tensor, Tensor]], woven: list[tuple[Tensor, Tensor]], how: str) -> list[Figure]:
    (plain_tokens, logits), (woven_tokens, _) = unsplit[0], woven[0]
    same = plain_tokens == woven_tokens
    leads = [lead_where_they_part(*each) for each in zip(plain_tokens, woven_tokens, logits.transpose(0, 1))]
    parted = [lead for lead in leads if lead is not None]
    note = f"{how}; {len(parted)} of {len(leads)} sequences part, at leads of {[round(lead, 3) for lead in parted]}"
    good = sum(lead is None or lead <= NEAR_TIE for lead in leads) / len(leads)
    return [
        Figure(
            "two virtual ranks: woven tokens are the unsplit ones, or part at a near-tie", good, "of sequences", 1.0
        ),
        Figure(
            "two virtual ranks: the same token at the same place", float(same.float().mean()), "of tokens", note=note
        ),
    ]


def lead_where_they_part(plain: Tensor, woven: Tensor, logits: Tensor) -> float | None:
    """By how much the unsplit run preferred its token to the woven run's, where the two first differ."""
    at = (plain != woven).nonzero()
    if not len(at):
        return None
    step = int(at[0])
    return float(logits[step, plain[step]] - logits[step, woven[step]])
