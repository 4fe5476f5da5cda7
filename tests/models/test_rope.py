"""Rotation angles against transformers' own module, for every scaling."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.checkpoints import SMALL
from tokenweave.models.registry import llama
from tokenweave.models.rope import Rope, rotate

TRAINED = 256
LONG = 1200
CPU = torch.device("cpu")

SCALINGS = {
    "default": {"rope_type": "default"},
    "another theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn with bounds": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn with a factor of its own": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.75,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@dataclass(frozen=True)
class Piece:
    """What a Rope reads of a half: tokens at `positions` of a sequence whose prompt has `prompt_len` tokens."""

    prompt_len: int
    positions: torch.Tensor

    @property
    def rope_lengths(self) -> list[int]:
        return [max(self.prompt_len, position + 1) for position in self.positions.tolist()]


def piece(prompt_len: int, start: int, stop: int) -> Piece:
    return Piece(prompt_len, torch.arange(start, stop))


def config_of(scaling: str, **options):
    parameters = {"rope_theta": 10000.0, **SCALINGS[scaling]}
    return AutoConfig.for_model(
        "llama", **{**SMALL, "max_position_embeddings": TRAINED, "rope_parameters": parameters, **options}
    )


def ours(config, max_model_len: int = LONG) -> Rope:
    return Rope(llama(config), config, max_model_len, CPU)


def theirs(module: LlamaRotaryEmbedding, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [tokens, 1, head_dim], of one forward over these positions."""
    cos, sin = module(torch.empty(1), torch.arange(start, stop)[None])
    return cos[0, :, None], sin[0, :, None]


def assert_same(got, expected) -> None:
    """Angles reach thousands of radians; in fp32 their cosine is good to 1e-4 or so."""
    for mine, yours in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-4)


@pytest.mark.parametrize("head_dim", [8, 12, 64])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_prompt_of_any_length(scaling, head_dim):
    config = config_of(scaling, head_dim=head_dim)
    rope = ours(config)
    for length in (1, 17, TRAINED - 1, TRAINED, TRAINED + 1, LONG):
        assert_same(rope(piece(length, 0, length)), theirs(LlamaRotaryEmbedding(config), 0, length))


@pytest.mark.parametrize("prompt_len", [1, 250, TRAINED, 300])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_decoding_after_a_prompt(scaling, prompt_len):
    """Of "dynamic", transformers' module remembers the longest position that it has seen."""
    config = config_of(scaling)
    rope, module = ours(config), LlamaRotaryEmbedding(config)
    theirs(module, 0, prompt_len)
    for position in range(prompt_len, prompt_len + 12):
        assert_same(rope(piece(prompt_len, position, position + 1)), theirs(module, position, position + 1))


@pytest.mark.parametrize("prompt_len", [100, 300, LONG])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_chunks_of_a_prompt_are_rotated_as_the_whole_is(scaling, prompt_len):
    rope = ours(config_of(scaling))
    whole = rope(piece(prompt_len, 0, prompt_len))
    cuts = [0, 1, prompt_len // 3, prompt_len // 2, prompt_len]
    chunks = [rope(piece(prompt_len, start, stop)) for start, stop in itertools.pairwise(cuts)]
    assert_same([torch.cat(parts) for parts in zip(*chunks, strict=True)], whole)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu():
    config, cuda = config_of("dynamic"), torch.device("cuda")
    rope = Rope(llama(config), config, LONG, cuda)
    long = SimpleNamespace(positions=torch.arange(LONG, device=cuda), rope_lengths=[LONG] * LONG)
    expected = rope(long)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = rope(long)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(again, expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_else_is_in_the_half_changes_little(scaling):
    """Short and long sequences together. Angles of short ones are computed in another way, in the last bits."""
    rope = ours(config_of(scaling))
    pieces = [piece(5, 0, 5), piece(LONG, 0, LONG), piece(10, TRAINED + 3, TRAINED + 4), piece(TRAINED, 0, TRAINED)]
    together = SimpleNamespace(
        positions=torch.cat([one.positions for one in pieces]),
        rope_lengths=[length for one in pieces for length in one.rope_lengths],
    )
    alone = [rope(one) for one in pieces]
    assert_same(rope(together), [torch.cat(parts) for parts in zip(*alone, strict=True)])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(scaling, dtype):
    config = config_of(scaling)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(30, heads, 8, generator=generator).to(dtype) for heads in (4, 2))
    rotary = ours(config)(piece(30, 0, 30))
    got = rotate(torch.cat((q, k), dim=1), rotary)
    wide = [x.float().transpose(0, 1)[None] for x in (q, k)]
    cos, sin = (table[None, :, 0] for table in theirs(LlamaRotaryEmbedding(config), 0, 30))
    expected = torch.cat(apply_rotary_pos_emb(*wide, cos, sin), dim=1)[0].transpose(0, 1)
    assert got.dtype == dtype
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(got.float(), expected, **tolerance)


def test_rotation_leaves_its_input_alone():
    x = torch.randn(3, 2, 8)
    before = x.clone()
    rotate(x, ours(config_of("default"))(piece(3, 0, 3)))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
)
def test_what_is_not_supported_is_an_error(parameters):
    config = AutoConfig.for_model("llama", **{**SMALL, "rope_parameters": {"rope_theta": 1e4, **parameters}})
    with pytest.raises(ValueError, match=r"^rope parameters \{.*\} are not supported; supported types: ") as caught:
        ours(config)
    assert "\n" not in str(caught.value)
