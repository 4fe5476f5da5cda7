"""Baselines on real ranks: the same logits as the runtime's own `off`; and what repeats a step's sums alone."""

import pytest
import torch

from perf.overlap.baselines import open_baselines
from perf.overlap.baselines.channel import BaselineCommunicator
from perf.overlap.noting import note_requests
from tokenweave.config import EngineConfig
from tokenweave.engine.rank import open_rank
from tokenweave.weave.plan import plan_step


def logits_of(folder, plant: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    rank = open_rank(EngineConfig(str(folder), overlap="off", num_kv_blocks=8, max_model_len=64, progress=False))
    runner = rank.runner
    batch, plan = runner.blank_batch(48), plan_step("off", 48, None)
    own = runner.forward(batch, plan)
    usable, missing = open_baselines(rank)
    runner.communicator = usable["NCCL"]
    if plant:
        runner.communicator.all_reduce = lambda total: 0
    other = runner.forward(batch, plan)
    rank.close()
    return own, other, missing


@pytest.mark.parametrize("name", ["llama", "llama_bias", "olmo2", "gemma2"])
def test_a_baseline_computes_what_off_does(ranks, checkpoint, name):
    for own, other, missing in ranks(2).run(logits_of, checkpoint(name)):
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-4)
        assert missing == {"multimem": "it needs CUDA", "FlashInfer": "it needs CUDA"}


def test_a_sum_that_is_left_out_shows(ranks, checkpoint):
    own, other, _ = ranks(2).run(logits_of, checkpoint("llama"), plant=True)[0]
    assert not torch.allclose(other, own, rtol=1e-2, atol=1e-2)


def bytes_again(folder) -> tuple[int, int, bool]:
    """What a step sends, what its sums alone send, and whether the runtime's communicator is in its place again."""
    rank = open_rank(EngineConfig(str(folder), overlap="off", num_kv_blocks=8, max_model_len=64, progress=False))
    runner = rank.runner
    own, opened = runner.communicator, []

    class Watching(BaselineCommunicator):
        def open(self, *arguments, **options):
            opened.append(own.open(*arguments, **options))
            return opened[-1]

    runner.communicator = watching = Watching(rank, type(None))
    batch, plan = runner.blank_batch(48), plan_step("fused", 48, None)
    replay = note_requests(runner, lambda: runner.forward(batch, plan))
    replay()
    replay()
    restored = runner.communicator is watching
    rank.close()
    first, *again = (channel.sent_bytes for channel in opened)
    assert again[0] == again[1]
    return first, again[0], restored


def test_the_sums_alone_send_what_the_step_sends(ranks, checkpoint):
    for first, again, restored in ranks(2).run(bytes_again, checkpoint("llama")):
        assert first == again > 0
        assert restored
