"""Dummy weights: one model whatever the number of ranks, without files, and lively enough to measure with."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.checkpoints import ARCHITECTURES, prompt_batch
from tokenweave import LLM, SamplingParams
from tokenweave.models.checkpoint import Checkpoint
from tokenweave.models.decoder import Decoder
from tokenweave.models.dummy import fill
from tokenweave.models.layers import Place
from tokenweave.models.registry import read_config, read_spec
from tokenweave.models.weights import load

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
OPTIONS = {"load_format": "dummy", "progress": False, "device": "cpu", "num_kv_blocks": 64}


@pytest.fixture(params=["llama", "gemma2", "qwen3_moe"])
def folder(request, checkpoint, tmp_path):
    """A folder that holds nothing but config.json."""
    shutil.copy(checkpoint(request.param) / "config.json", tmp_path)
    return tmp_path


def generate(folder, options):
    with LLM(folder, **OPTIONS, **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompt_batch(0, (5, 40)), PARAMS)]


def test_a_config_is_enough_and_ranks_hold_one_model(folder, ranks):
    alone = generate(folder, {})
    assert ranks(2).run(generate, folder, {"overlap": "weave"}) == [alone, alone]


def test_greedy_text_does_not_stand_still(checkpoint):
    assert all(len(set(tokens)) > 4 for tokens in generate(checkpoint("llama"), {}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_fills_what_a_checkpoint_fills(name, checkpoint):
    """Nothing stays as it was allocated, nothing else is written, and logits would be about as spread."""
    folder = checkpoint(name)
    config = read_config(folder)
    spec = read_spec(folder, config)
    model = Decoder(spec, config, 64, Place(0, 1, torch.float32, torch.device("cpu")))
    load(model.loads(), Checkpoint(folder))
    for each in model.loads():
        each.into.fill_(float("nan"))
    fill(model.loads(), spec.norm_offset)
    assert all(each.into.isfinite().all() for each in model.loads())
    head = model.head.weight
    assert 2.0 < float(head.std() * head.shape[1] ** 0.5) < 4.0
    assert float(model.norm.weight.mean()) == 1.0 - spec.norm_offset


def test_a_slice_is_that_of_the_whole(checkpoint):
    folder = checkpoint("llama")
    config = read_config(folder)
    spec = read_spec(folder, config)
    models = [Decoder(spec, config, 64, Place(rank, 2, torch.float32, torch.device("cpu"))) for rank in range(2)]
    whole = Decoder(spec, config, 64, Place(0, 1, torch.float32, torch.device("cpu")))
    for model in (whole, *models):
        fill(model.loads())
    joined = torch.cat([model.layers[1].mlp.down.weight for model in models], dim=1)
    assert torch.equal(joined, whole.layers[1].mlp.down.weight)
    assert not torch.equal(whole.layers[0].mlp.down.weight, whole.layers[1].mlp.down.weight)
