import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tokenweave.models import weights
from tokenweave.models.checkpoint import Checkpoint
from tokenweave.models.shards import CheckpointError, open_shard
from tokenweave.models.weights import Load, load, unused

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
}
ARCHITECTURES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "Olmo2": {},
    "Gemma2": {"head_dim": 16},
}


def make_model(name: str, seed: int = 0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **ARCHITECTURES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # norm weights and biases too, or a mix-up of two would not show
    return model


def save(tensors: dict[str, torch.Tensor], folder: Path) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    """(a model, its checkpoint in several shards)"""
    model = make_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model, Checkpoint(folder)


def is_fused(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def on_disk(model) -> dict[str, torch.Tensor]:
    """The state dict without what the file spells otherwise (experts, Mixtral's router) or leaves out (a tied head)."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    mixtral_router = ".mlp.gate." if model.config.model_type == "mixtral" else "\0"
    state = model.state_dict()
    return {n: t for n, t in state.items() if n not in tied and not is_fused(n) and mixtral_router not in n}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_ranks_slices_make_up_every_tensor(saved, world_size, dim):
    model, checkpoint = saved
    for name, tensor in on_disk(model).items():
        got = torch.full_like(tensor, torch.nan)
        at = min(dim, tensor.dim() - 1)
        cuts = [tensor.shape[at] * rank // world_size for rank in range(world_size + 1)]
        for start, stop in itertools.pairwise(cuts):
            index = (*[slice(None)] * at, slice(start, stop))
            load([Load(got[index], name, index, shape=tuple(tensor.shape))], checkpoint)
        same(got, tensor)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("original_format", [True, False])
def test_experts_in_either_layout(tmp_path, name, original_format):
    model = make_model(name)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    checkpoint = Checkpoint(tmp_path)
    assert any(map(is_fused, checkpoint.names)) != original_format
    state, layer, rows = model.state_dict(), "model.layers.1.mlp", slice(8, 16)
    block = "model.layers.1.block_sparse_moe" if name == "Mixtral" else layer
    gate, up, down = ("w1", "w3", "w2") if name == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
    gate_up, columns = state[f"{layer}.experts.gate_up_proj"], (slice(None), rows)
    width = gate_up.shape[1] // 2
    up_rows = slice(width + rows.start, width + rows.stop)
    got_gate, got_up, got_down = torch.empty(4, 8, 32), torch.empty(4, 8, 32), torch.empty(4, 32, 8)
    router = torch.empty(4, 32)
    loads = [Load(router, f"{block}.gate.weight", (), ((f"{layer}.gate.weight", ()),))]
    for e in range(4):
        expert, both = f"{block}.experts.{e}", f"{layer}.experts.gate_up_proj"
        fused_down = (f"{layer}.experts.down_proj", (e, *columns), (4, 32, width))
        loads += [
            Load(got_gate[e], f"{expert}.{gate}.weight", (rows,), ((both, (e, rows)),), shape=(width, 32)),
            Load(got_up[e], f"{expert}.{up}.weight", (rows,), ((both, (e, up_rows)),)),
            Load(got_down[e], f"{expert}.{down}.weight", columns, (fused_down,)),
        ]
    load(loads, checkpoint)
    same(router, state[f"{layer}.gate.weight"])
    same(got_gate, gate_up[:, rows])
    same(got_up, gate_up[:, up_rows])
    same(got_down, state[f"{layer}.experts.down_proj"][..., rows])
    assert not [n for n in unused(loads, checkpoint) if n.startswith((layer, block))]


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("chunk_bytes", [1, 64, 1 << 20])
@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("stored", FLOATS, ids=str)
def test_dtypes_are_converted_as_torch_does(tmp_path, monkeypatch, stored, to, chunk_bytes):
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
    tensor = (1000 * torch.randn(7, 5, dtype=torch.float64)).to(stored)
    into = torch.empty(3, 5, dtype=to)
    load([Load(into, "w", (slice(2, 5),))], save({"w": tensor}, tmp_path))
    same(into, tensor[2:5].to(to))


@pytest.mark.parametrize("chunk_bytes", [1, 4, 20, 44, 1 << 20])
@pytest.mark.parametrize(
    "index",
    [(), (1,), (slice(1, 3),), (2, slice(1, 4)), (slice(None), 3), (slice(0, 2), slice(2, 5), slice(1, 6)), (0, 1, 2)],
    ids=str,
)
def test_large_slices_in_pieces_into_strided_views(tmp_path, monkeypatch, index, chunk_bytes):
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
    tensor = torch.randn(3, 5, 7)
    expected = tensor[index]
    around = torch.full((2, *expected.shape, 2), torch.nan, dtype=torch.bfloat16)
    load([Load(around[1, ..., 0], "w", index, shape=(3, 5, 7))], save({"w": tensor}, tmp_path))
    same(around[1, ..., 0], expected.bfloat16())
    assert around[0].isnan().all()
    assert around[..., 1].isnan().all()


@pytest.mark.parametrize(("chunk_bytes", "pieces"), [(1 << 20, 1), (4 * 7 * 5, 4), (4 * 7, 16), (4, 105)])
def test_pieces_are_as_few_as_halving_gives(tmp_path, monkeypatch, chunk_bytes, pieces):
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
    copy = weights._find(Load(torch.empty(3, 5, 7), "w"), save({"w": torch.zeros(3, 5, 7)}, tmp_path))
    cut = list(weights._pieces(copy))
    assert len(cut) <= pieces
    assert sum(piece.size_bytes for piece in cut) == copy.size_bytes
    assert max(piece.size_bytes for piece in cut) <= chunk_bytes


def test_scalars_empty_shares_and_parameters(tmp_path):
    checkpoint = save({"scalar": torch.tensor(3.5), "w": torch.ones(4, 2)}, tmp_path)
    scalar, parameter = torch.zeros(()), torch.nn.Parameter(torch.zeros(4, 2))
    none = [Load(torch.empty(0, 2), "w", (slice(4, 4),)), Load(torch.empty(4, 0), "w", (slice(None), slice(2, 2)))]
    load([Load(scalar, "scalar"), Load(parameter, "w"), *none], checkpoint)
    assert scalar == 3.5
    assert parameter.eq(1).all()
    assert parameter.requires_grad
    assert parameter.grad_fn is None


NORM = "model.norm.weight"
MISFITS = {
    "missing tensor": (
        Load(torch.empty(32), "model.norm.bias"),
        "no tensor 'model.norm.bias'; nearest are .*norm.weight",
    ),
    "whole": (Load(torch.empty(33), NORM), r"'model.norm.weight' in .*.safetensors has shape \[32\], expected \[33\]"),
    "whole, spelled": (Load(torch.empty(33), NORM, (slice(None),)), r"has shape \[32\], expected \[33\]"),
    "rank": (Load(torch.empty(32, 1), NORM), r"has shape \[32\], expected \[32, 1\]"),
    "too many dimensions": (
        Load(torch.empty(9, 4), NORM, (slice(0, 9), slice(0, 4))),
        r"expected one with \[9, 4\] at",
    ),
    "behind the end": (
        Load(torch.empty(8), NORM, (slice(28, 36),)),
        r"has shape \[32\], expected one with \[8\] at \[28:36\]",
    ),
    "row behind the end": (
        Load(torch.empty(32), "lm_head.weight", (67,)),
        r"\[67, 32\], expected one with \[32\] at \[67\]",
    ),
    "other dimension": (
        Load(torch.empty(9, 31), "lm_head.weight", (slice(9),)),
        r"expected one with \[9, 31\] at \[0:9\]",
    ),
    "larger than said": (
        Load(torch.empty(8), NORM, (slice(8),), shape=(16,)),
        r"has shape \[32\], expected \[16\]; check",
    ),
    "alternative": (Load(torch.empty(8), "x", (), ((NORM, (slice(8),), (16,)),)), r"has shape \[32\], expected \[16\]"),
    "no alternative": (Load(torch.empty(8), "xyz", (), (("uvw", ()),)), "has no tensor 'xyz'; nearest are"),
}


@pytest.mark.parametrize(("misfit", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_misfits_are_found_before_anything_is_copied(tmp_path, misfit, message):
    make_model("Mistral").save_pretrained(tmp_path)
    good = torch.full((32,), torch.nan)
    with pytest.raises(
        CheckpointError, match=rf"(?s)\A(?=[^\n]*\Z).*{message}.*config.json belongs to these weights\Z"
    ):
        load([Load(good, NORM), misfit], Checkpoint(tmp_path))
    assert good.isnan().all()


def test_every_file_is_opened_once_and_only_where_needed(saved, monkeypatch):
    model, checkpoint = saved
    opened: list[Path] = []
    monkeypatch.setattr(weights, "open_shard", lambda file: opened.append(file) or open_shard(file))
    names = [name for name in on_disk(model) if "layers.0" not in name]
    shuffled = sorted(names, key=lambda name: name[::-1])
    load([Load(torch.empty_like(model.state_dict()[name]), name) for name in shuffled], checkpoint)
    assert sorted(opened) == sorted({checkpoint.entry(name).file for name in names})


def test_a_quantised_tensor(tmp_path):
    checkpoint = save({"w": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"'w' in .*model.safetensors is F8_E4M3; expected one of .*unquantised"):
        load([Load(torch.empty(4, 4), "w")], checkpoint)


def test_a_file_truncated_after_opening(tmp_path):
    checkpoint = save({"w": torch.zeros(4, 4)}, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"cannot read {re.escape(str(file))} .*truncated"):
        load([Load(torch.empty(4, 4), "w")], checkpoint)


def test_unused_names_what_nobody_asked_for(tmp_path):
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint = save({name: torch.zeros(2) for name in ("a", "b.bias", "c", rotary)}, tmp_path)
    loads = [Load(torch.empty(2), "a"), Load(torch.empty(2), "x", (), (("c", ()),))]
    assert unused(loads, checkpoint) == ["b.bias"]


def test_progress_is_shown_only_if_asked_for_and_on_a_terminal(tmp_path, capsys, monkeypatch):
    checkpoint = save({"w": torch.zeros(300, 1000)}, tmp_path)
    load([Load(torch.empty(100, 1000), "w", (slice(100),))], checkpoint)
    assert capsys.readouterr().err == ""
    load([Load(torch.empty(100, 1000), "w", (slice(100),))], checkpoint, progress=True)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load([Load(torch.empty(100, 1000), "w", (slice(100),))], checkpoint, progress=True)
    assert re.search(r"loading weights: 100%.*400k/400k", capsys.readouterr().err)


# Loads one rank's share of a folder and prints, in MiB: its share, the peak of anonymous memory (RssAnon, sampled each
# millisecond) over what the process had before, and the mapped file pages (RssFile) that stay when loading is done.
MEASURE = """
import json, sys, threading, time, torch
from pathlib import Path
from tokenweave.models import weights
from tokenweave.models.checkpoint import Checkpoint
from tokenweave.models.weights import Load, load

def resident_mib(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024

def sample():
    while not done.is_set():
        peak[0] = max(peak[0], resident_mib("RssAnon"))
        time.sleep(0.001)

def owned(name, shape, world_size):
    if len(shape) == 1 or world_size == 1:
        return ()
    dim = 1 if "o_proj" in name or "down_proj" in name else 0
    return (*[slice(None)] * dim, slice(shape[dim] // world_size, 2 * shape[dim] // world_size))

folder, world_size, dtype = Path(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
weights.CHUNK_BYTES = 1 << 20  # what loading may hold besides the destinations, kept small to see the share
torch.zeros(1 << 20).to(dtype)
checkpoint, done, peak = Checkpoint(folder), threading.Event(), [0.0]
sampler = threading.Thread(target=sample)
sampler.start()
anonymous, mapped = resident_mib("RssAnon"), resident_mib("RssFile")
loads = []
for name in checkpoint.names:
    index = owned(name, checkpoint.shape(name), world_size)
    shape = torch.empty(checkpoint.shape(name), device="meta")[index].shape
    loads.append(Load(torch.empty(shape, dtype=dtype), name, index, shape=checkpoint.shape(name)))
load(loads, checkpoint)
peak[0] = max(peak[0], resident_mib("RssAnon"))
done.set()
sampler.join()
share = sum(wanted.into.nbytes for wanted in loads) / 2**20
print(json.dumps({"share": share, "peak": peak[0] - anonymous, "mapped": resident_mib("RssFile") - mapped}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """180 MiB of float32 in shards, half of it in the embedding and the head."""
    folder = tmp_path_factory.mktemp("large")
    shape = {**SHAPE, "hidden_size": 512, "vocab_size": 24576, "intermediate_size": 1536, "num_hidden_layers": 7}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    model.save_pretrained(folder, max_shard_size="60MB")
    return folder


def measure(folder: Path, world_size: int, dtype: str) -> dict[str, float]:
    root = str(Path(weights.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(world_size), dtype],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_takes_the_memory_of_its_share(large, dtype):
    whole, quarter = measure(large, 1, dtype), measure(large, 4, dtype)
    slack_mib = 8.0
    assert whole["share"] == pytest.approx(180 if dtype == "float32" else 90, rel=0.01)
    assert quarter["share"] == pytest.approx(whole["share"] / 4, rel=0.01)
    for memory in (whole, quarter):
        assert 0.9 * memory["share"] <= memory["peak"] <= memory["share"] + slack_mib
        assert memory["mapped"] <= slack_mib  # the files' pages went with their mappings
