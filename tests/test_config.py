from __future__ import annotations

import dataclasses
import pickle

import pytest

from tokenweave.comm.link import Link
from tokenweave.config import EngineConfig

BAD = [
    ({"overlap": "yes"}, "overlap must be one of auto, off, fused, weave, got 'yes'"),
    ({"overlap": None}, "overlap must be one of auto, off, fused, weave, got None"),
    ({"dtype": "fp32"}, "dtype must be one of auto, float32, bfloat16, float16, got 'fp32'"),
    ({"load_format": "gguf"}, "load_format must be one of auto, dummy, got 'gguf'"),
    ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
    ({"attention": "sdpa"}, "attention must be one of auto, torch, triton, flashinfer, got 'sdpa'"),
    ({"async_scheduling": "yes"}, "async_scheduling must be of type bool, got 'yes'"),
    ({"gpu_memory_utilization": 0}, "gpu_memory_utilization must be > 0 and <= 1, got 0"),
    ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization must be > 0 and <= 1, got 1.01"),
    ({"gpu_memory_utilization": True}, "gpu_memory_utilization must be of type int or float, got True"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be a whole number >= 1, got 0"),
    ({"max_num_seqs": -1}, "max_num_seqs must be a whole number >= 1, got -1"),
    ({"block_size": 1.5}, "block_size must be a whole number >= 1, got 1.5"),
    ({"block_size": True}, "block_size must be a whole number >= 1, got True"),
    ({"block_size": None}, "block_size must be a whole number >= 1, got None"),
    ({"cuda_graph_max_tokens": 0}, "cuda_graph_max_tokens must be a whole number >= 1, got 0"),
    ({"enforce_eager": 1}, "enforce_eager must be of type bool, got 1"),
    ({"num_kv_blocks": 0}, "num_kv_blocks must be a whole number >= 1, got 0"),
    ({"max_model_len": "4k"}, "max_model_len must be a whole number >= 1, got '4k'"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size must be a whole number >= 1, got 0"),
    ({"timeout_s": 0}, "timeout_s must be > 0 and at most 1e+09 seconds, got 0"),
    ({"timeout_s": float("nan")}, "timeout_s must be > 0 and at most 1e+09 seconds, got nan"),
    ({"timeout_s": float("inf")}, "timeout_s must be > 0 and at most 1e+09 seconds, got inf"),
    ({"trace": "x.png"}, "trace must name a .json file (its picture is written beside it as .png), got 'x.png'"),
    ({"link": 3}, "link must be a tokenweave.comm.link.Link or None, got 3"),
]
# What the issue promises.
DEFAULTS = {
    "overlap": "auto",
    "dtype": "auto",
    "device": "auto",
    "attention": "auto",
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "block_size": 16,
    "num_kv_blocks": None,
    "gpu_memory_utilization": 0.9,
    "async_scheduling": None,
    "max_model_len": None,
    "enable_prefix_caching": True,
    "seed": 0,
}


def test_defaults():
    config = EngineConfig("folder")
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_value_that_cannot_be(options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        EngineConfig("folder", **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_sise": 3}, r"^EngineConfig has no option 'block_sise'; did you mean 'block_size'\?$"),
        (
            {"zzz": 3},
            r"^EngineConfig has no option 'zzz'; the options are async_scheduling, attention, block_size, .*trace$",
        ),
    ],
)
def test_an_unknown_option(options, message):
    with pytest.raises(TypeError, match=message):
        EngineConfig("folder", **options)


def test_the_least_and_the_most_unusual_values():
    EngineConfig("folder", max_num_batched_tokens=1, max_num_seqs=1, block_size=1, num_kv_blocks=1, max_model_len=1)
    EngineConfig("folder", timeout_s=0.5, link=Link(1e9), tensor_parallel_size=8, overlap="weave", dtype="float16")


def test_it_travels_to_other_processes_and_cannot_change():
    config = EngineConfig("folder", link=Link(1e9, 1e-5))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
