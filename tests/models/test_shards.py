import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenweave.models.shards import CheckpointError, Entry, find_tensors, open_shard

TENSORS = {"a.weight": torch.arange(2048.0).reshape(64, 32), "b.bias": torch.arange(8.0, dtype=torch.bfloat16)}


def one_line_error(match: str):
    """Expects a CheckpointError of one line that `match` is found in."""
    return pytest.raises(CheckpointError, match=rf"\A(?=[^\n]*\Z)(?s:.*){match}")


def header_bytes(raw: bytes) -> int:
    return 8 + struct.unpack("<Q", raw[:8])[0]


def with_header(raw: bytes, change) -> bytes:
    header = json.loads(raw[8 : header_bytes(raw)])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[header_bytes(raw) :]


BROKEN = {
    "empty": lambda raw: b"",
    "cut in the length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[: header_bytes(raw) // 2],
    "cut at the data": lambda raw: raw[: header_bytes(raw)],
    "cut in the data": lambda raw: raw[:-100],
    "one byte short": lambda raw: raw[:-1],
    "trailing bytes": lambda raw: raw + b"xx",
    "zeros": lambda raw: bytes(len(raw)),
    "header not JSON": lambda raw: raw[:8] + b"x" * (len(raw) - 8),
    "huge header": lambda raw: struct.pack("<Q", 2**60) + raw[8:],
    "offsets outside": lambda raw: with_header(raw, lambda h: h["b.bias"].update(data_offsets=[0, 10**9])),
    "shape not its bytes": lambda raw: with_header(raw, lambda h: h["b.bias"].update(shape=[9])),
    "unknown dtype": lambda raw: with_header(raw, lambda h: h["b.bias"].update(dtype="Q9")),
    "web page": lambda raw: b"<!DOCTYPE html><html><body>404 not found</body></html>" * 4,
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for (name, tensor), file in zip(TENSORS.items(), names, strict=True):
        save_file({name: tensor}, tmp_path / file)
    weight_map = dict(zip(TENSORS, names, strict=True))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_entries_of_a_single_file(single):
    file = single / "model.safetensors"
    assert find_tensors(single) == {"a.weight": Entry(file, (64, 32), "F32"), "b.bias": Entry(file, (8,), "BF16")}


def test_entries_of_shards_with_an_index(sharded):
    files = {name: entry.file.name for name, entry in find_tensors(sharded).items()}
    assert files == {"a.weight": "model-00001-of-00002.safetensors", "b.bias": "model-00002-of-00002.safetensors"}


def test_entries_of_shards_without_an_index(sharded):
    expected = find_tensors(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    assert find_tensors(sharded) == expected


def test_a_single_file_wins_over_a_stale_index(sharded):
    save_file({"c": torch.zeros(3)}, sharded / "model.safetensors")
    assert list(find_tensors(sharded)) == ["c"]


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_single_file(single, damage):
    file = single / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with one_line_error(re.escape(f"{file} (") + f".*with {file.stat().st_size} bytes it is truncated or not"):
        find_tensors(single)


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_shard(sharded, damage):
    file = sharded / "model-00002-of-00002.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with one_line_error(re.escape(str(file)) + ".*truncated or not a safetensors file"):
        find_tensors(sharded)


def test_a_git_lfs_pointer(single):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with one_line_error("model.safetensors .*git-lfs pointer.*git lfs pull"):
        find_tensors(single)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with one_line_error("model.safetensors .*expected a safetensors file"):
        find_tensors(tmp_path)


def test_a_dangling_link(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with one_line_error("model.safetensors .*the file is missing"):
        find_tensors(tmp_path)


def test_a_file_that_went_away(tmp_path):
    with one_line_error("gone.safetensors .*the file is missing"):
        open_shard(tmp_path / "gone.safetensors")


def test_an_index_that_names_a_missing_file(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with one_line_error("index.json names the file model-00002-of-00002.safetensors, which is not there"):
        find_tensors(sharded)


def test_an_index_that_puts_a_tensor_in_the_wrong_file(sharded):
    save_file({"other": torch.zeros(3)}, sharded / "model-00002-of-00002.safetensors")
    with one_line_error("index.json says that tensor 'b.bias' is in model-00002-of-00002.safetensors, which does not"):
        find_tensors(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', "\x80"])
def test_an_index_that_is_no_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    with one_line_error("index.json .*expected JSON with a 'weight_map'"):
        find_tensors(sharded)


def test_a_tensor_in_two_files(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    save_file(TENSORS, tmp_path / "y.safetensors")
    with one_line_error("tensor 'a.weight' is in .*x.safetensors and in y.safetensors"):
        find_tensors(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with one_line_error("holds no .*safetensors file; download or copy the weights"):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "q4.gguf"]
)
def test_weights_in_another_format(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with one_line_error(f"only {name}; convert it with transformers: AutoModelForCausalLM.*save_pretrained"):
        find_tensors(tmp_path)
