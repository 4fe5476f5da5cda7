"""What a rank must hold, against the models' own parameters."""

from __future__ import annotations

import pytest
import torch

from perf.figure_11 import llama_70b
from tests.checkpoints import ARCHITECTURES
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.memory import kv_bytes_per_token, memory_of, smallest_world_size, weights_bytes
from tokenweave.cost.shape import read_shape
from tokenweave.models.decoder import Decoder
from tokenweave.models.layers import Place
from tokenweave.models.registry import read_config, read_spec

H100 = find_hardware("h100-sxm")
LLAMA_70B = read_shape(llama_70b())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "olmo2", "qwen3_moe"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_weights_are_those_that_a_rank_loads(checkpoint, name, world_size):
    if name not in ARCHITECTURES:
        pytest.skip("no such checkpoint")
    folder = checkpoint(name)
    config = read_config(folder)
    place = Place(0, world_size, torch.bfloat16, torch.device("cpu"))
    decoder = Decoder(read_spec(folder, config), config, 64, place)
    loaded = sum(load.into.numel() * load.into.element_size() for load in decoder.loads())
    # norms of q and k are left out: a few numbers a layer
    assert weights_bytes(read_shape(folder, "bfloat16"), world_size) == pytest.approx(loaded, rel=0.01)


def test_the_published_size_of_llama_70b():
    assert weights_bytes(LLAMA_70B, 1) == 2 * 70_553_706_496  # parameters, as the hub states them
    assert weights_bytes(LLAMA_70B, 8) == pytest.approx(2 * 70_553_706_496 / 8, rel=1e-3)


def test_keys_and_values_are_replicated_where_ranks_exceed_their_heads():
    assert kv_bytes_per_token(LLAMA_70B, 1) == 80 * 2 * 8 * 128 * 2
    assert kv_bytes_per_token(LLAMA_70B, 8) == kv_bytes_per_token(LLAMA_70B, 16) == 80 * 2 * 128 * 2


def test_what_fits():
    memory = memory_of(LLAMA_70B, H100, 8)
    held = memory.weights_bytes + memory.workspace_bytes + memory.kv_tokens * memory.kv_bytes_per_token
    assert held <= memory.usable_bytes < held + memory.kv_bytes_per_token
    assert memory.largest_batch(4096) * 4096 <= memory.kv_tokens
    assert memory.largest_context(64) * 64 <= memory.kv_tokens
    assert memory_of(LLAMA_70B, H100, 1).kv_tokens == 0
    assert memory_of(LLAMA_70B, H100, 8, step_tokens=65536).kv_tokens < memory.kv_tokens


def test_the_smallest_world_size():
    assert smallest_world_size(LLAMA_70B, H100, tokens=4096) == 2
    assert smallest_world_size(LLAMA_70B, H100, tokens=100_000) == 4
    assert smallest_world_size(LLAMA_70B, find_hardware("b200"), tokens=4096) == 1
    assert smallest_world_size(LLAMA_70B, H100, tokens=10**9) is None
