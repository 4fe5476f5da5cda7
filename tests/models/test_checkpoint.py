from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tokenweave.models.checkpoint import Checkpoint
from tokenweave.models.shards import CheckpointError

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 67}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


@pytest.fixture(scope="module", params=["single", "sharded", "no index"])
def folder(request, model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, max_shard_size="1GB" if request.param == "single" else "15KB")
    assert (request.param == "single") == (folder / "model.safetensors").exists()
    if request.param == "no index":
        (folder / "model.safetensors.index.json").unlink()
    return folder


def test_it_holds_the_models_tensors(model, folder):
    checkpoint = Checkpoint(folder)
    assert {name: checkpoint.shape(name) for name in checkpoint.names} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert all(checkpoint.dtype(name) == torch.float32 for name in checkpoint.names)
    assert "model.norm.weight" in checkpoint
    assert "model.norm.bias" not in checkpoint


@pytest.mark.parametrize(
    "index",
    [(), (slice(3, 20),), (slice(None), slice(5, 9)), (slice(30, 32), slice(0, 32)), (slice(4, 4),), (7,)],
    ids=str,
)
def test_slices_equal_those_of_the_full_tensor(model, folder, index):
    checkpoint = Checkpoint(folder)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            torch.testing.assert_close(checkpoint.read(name, index), tensor[index], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype_is_that_on_disk(tmp_path, dtype):
    save_file({"w": torch.randn(4, 4).to(dtype)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.dtype("w") == dtype == checkpoint.read("w").dtype


@pytest.mark.parametrize(("dtype", "word"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_tensors_are_refused_when_used(tmp_path, dtype, word):
    save_file({"w": torch.zeros(4, 4).to(dtype), "ok": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read("ok").tolist() == [1, 1]
    for use in (checkpoint.dtype, checkpoint.read):
        with pytest.raises(CheckpointError, match=f"'w' in .*model.safetensors is {word}; expected one of F64, F32"):
            use("w")


@pytest.mark.parametrize("method", ["entry", "shape", "dtype", "read"])
def test_a_missing_tensor_names_its_neighbours(folder, method):
    name = "model.layers.1.self_attn.q_norm.weight"
    with pytest.raises(
        CheckpointError, match=rf"{folder} has no tensor '{name}'; nearest are .*self_attn.*config.json"
    ):
        getattr(Checkpoint(folder), method)(name)


def test_a_missing_tensor_unlike_any_other(folder):
    with pytest.raises(CheckpointError, match=r"has no tensor 'zzz'; nearest are '.*config.json belongs"):
        Checkpoint(folder).read("zzz")
