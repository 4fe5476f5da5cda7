"""The fused channel, over the kernel's twins, against the maths of Reduce; in the runtime, against the other forms."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import prompt_batch
from tests.comm.test_channels import EMBED, HIDDEN, LAYERS, MAX_ROWS, Case, Sum, check, give_back, requests, run_case
from tests.comm.twins import open_twin, twins_in_the_runtime
from tests.runtime import watched_generate
from tokenweave import SamplingParams
from tokenweave.comm.fused import one_shot_rows
from tokenweave.comm.group import PeerError
from tokenweave.comm.symmetric import Layout
from tokenweave.weave.lanes import InlineLane

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which compiles the kernel's twin")

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = prompt_batch(0, (1, 9, 40))
CASES = [
    Case((EMBED, *LAYERS[name], Sum(post_norm=name == "gemma", rows=cut), LAYERS[name][1]), rows, offset=offset)
    for name, offset in (("llama", 0.0), ("gemma", 1.0))
    for rows, cut in [(1, None), (1, (0,)), (2, (1,)), (3, None), (13, (3, 12)), (MAX_ROWS, (39,)), (33, ())]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("twins")


def run_fused(kind: str, folder: Path, one_shot: int) -> tuple[list[list[torch.Tensor]], set[str]]:
    communicator = open_twin(kind, folder, Layout(MAX_ROWS, HIDDEN, torch.float32), one_shot)
    results = [run_case(communicator, "fused", case) for case in CASES]
    communicator.check()
    return results, {variant.sum for variant, _ in communicator.wiring.kernels.launches}


@pytest.mark.parametrize(
    ("world_size", "kind", "one_shot", "sums"),
    [(2, "peer", 12, {"one_shot", "two_shot"}), (3, "multimem", 0, {"multimem"})],
)
def test_channels_follow_the_maths(ranks, folder, world_size, kind, one_shot, sums):
    answers = ranks(world_size).run(run_fused, kind, folder, one_shot)
    check([results for results, _ in answers], CASES, world_size)
    assert all(used == sums for _, used in answers)


def generate_fused(kind: str, folder: Path, model: Path, options: dict) -> tuple:
    with twins_in_the_runtime(kind, folder, one_shot_rows=4) as opened:
        watched = watched_generate(model, PROMPTS, GREEDY, options)
    launches = opened[0].wiring.kernels.launches
    return watched.tokens, {(variant.sum, variant.listed) for variant, _ in launches}, {sms for _, sms in launches}


@pytest.mark.parametrize(("kind", "overlap"), [("peer", "fused"), ("peer", "weave"), ("multimem", "weave")])
def test_the_runtime_generates_the_same(ranks, folder, checkpoint, kind, overlap):
    options = {"dtype": "float32", "overlap": overlap, "num_kv_blocks": 64}
    plain = ranks(2).run(watched_generate, checkpoint("llama"), PROMPTS, GREEDY, options | {"overlap": "off"})
    fused = ranks(2).run(generate_fused, kind, folder, checkpoint("llama"), options)
    for tokens, forms, sms in fused:
        assert tokens == plain[0].tokens
        expected = {"multimem"} if kind == "multimem" else {"one_shot", "two_shot"}
        assert {form for form, _ in forms} == expected
        assert any(listed for _, listed in forms)
        assert max(sms) <= (4 if overlap == "weave" else 16)


def abandoned(folder: Path) -> list[str]:
    """Rank 1 stays away from the second sum; afterwards both start again."""
    communicator = open_twin("peer", folder, Layout(MAX_ROWS, HIDDEN, torch.float32), timeout_s=8.0)
    said = []
    case = Case((EMBED, Sum()), rows=5)
    run_case(communicator, "fused", case)  # compiles, for which ranks meet
    first, second = requests(case, communicator.rank)
    channel = communicator.open(5, 0, InlineLane(), "fused", {"attn": 2})
    give_back(channel, first)
    if communicator.rank == 0:
        give_back(channel, second)
        give_back(channel, second)  # queued behind it: comes back at once
        for attempt in (communicator.check, communicator.check, lambda: communicator.open(1, 0, None, "fused", {})):
            with pytest.raises(PeerError) as caught:
                attempt()
            said.append(str(caught.value))
    communicator.reset(dist.barrier)
    results = run_case(communicator, "fused", case)
    communicator.check()
    check([[results]], [case], 2)
    return said


def test_a_rank_that_stays_away_is_reported_and_reset_starts_again(ranks, folder):
    said, _ = ranks(2).run(abandoned, folder)
    assert len(said) == 3
    for text in said:
        # Whichever block gives up first.
        waited = r"rank 0, half 0, block \d: rank 1 did not arrive within 8 s \(expected epoch 7: 5 rows, "
        assert re.match(waited, text), text


def told_to_give_up(folder: Path) -> list[str]:
    """Rank 1 stays away from the second sum until rank 0's host has had it give up; afterwards both start again."""
    communicator = open_twin("peer", folder, Layout(MAX_ROWS, HIDDEN, torch.float32), timeout_s=600.0)
    case = Case((EMBED, Sum()), rows=5)
    run_case(communicator, "fused", case)
    first, second = requests(case, communicator.rank)
    channel = communicator.open(5, 0, InlineLane(), "fused", {"attn": 2})
    give_back(channel, first)
    if communicator.rank == 0:
        threading.Timer(0.3, communicator.abort, ("the call was given up",)).start()
        give_back(channel, second)
    dist.barrier()
    give_back(channel, second)  # comes back at once
    said = []
    for attempt in (communicator.check, lambda: communicator.open(1, 0, None, "fused", {})):
        with pytest.raises(PeerError) as caught:
            attempt()
        said.append(str(caught.value))
    communicator.reset(dist.barrier)
    results = run_case(communicator, "fused", case)
    communicator.check()
    check([[results]], [case], 2)
    return said


def test_a_rank_that_its_host_told_to_give_up_says_so_and_the_other_whom_to_look_at(ranks, folder):
    (told, told_again), (heard, heard_again) = ranks(2).run(told_to_give_up, folder)
    assert (told, heard) == (told_again, heard_again)
    waited = r"rank 0, half 0, block \d: told by its host to give up on rank 1 \(expected epoch 7: 5 rows, 2 blocks, "
    assert re.match(rf"{waited}seen epoch 6: .*\): the call was given up$", told), told
    other = r"rank 1, half 0, block \d: rank 0 gave up, which was told to by its host; look at that rank's output"
    assert re.fullmatch(other, heard), heard


def test_nothing_is_opened_after_an_abort(ranks, folder):
    assert ranks(2).run(open_after_abort, folder) == ["rank 0: it failed", "rank 1: it failed"]


def open_after_abort(folder: Path) -> str:
    """Nothing was in flight, so nothing is reported."""
    communicator = open_twin("peer", folder, Layout(MAX_ROWS, HIDDEN, torch.float32))
    communicator.abort("it failed")
    communicator.check()
    with pytest.raises(PeerError) as caught:
        communicator.open(1, 0, InlineLane(), "fused", {})
    return str(caught.value)


@pytest.mark.parametrize(("world_size", "rows"), [(2, 7), (4, 3), (8, 1)])
def test_one_shot_is_for_few_rows(world_size, rows):
    assert one_shot_rows(world_size, row_bytes=16384) == rows
