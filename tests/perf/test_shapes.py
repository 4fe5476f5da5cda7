"""Models to measure with: every published name as a Hugging Face config, folders, and what cannot be."""

import json

import pytest

from perf.configs import config_of, shrink
from perf.shapes import TINY, check, find_model, full_name
from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.shape import read_shape, shard_shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_sizes(name):
    assert read_shape(config_of(name)) == PUBLISHED[name]
    tiny = read_shape(shrink(config_of(name)))
    assert (tiny.hidden_size, len(tiny.layers), tiny.qk_norm) == (64, 2, PUBLISHED[name].qk_norm)
    assert (tiny.layers[0].experts > 0) == (PUBLISHED[name].layers[0].experts > 0)
    assert shard_shape(tiny, 8).heads == 1


def test_names_folders_and_ids(tmp_path):
    assert full_name("llama-3.3-70b-instruct") == "Llama-3.3-70B"
    assert full_name(str(tmp_path)) == str(tmp_path)
    assert full_name("org/any-model") == "org/any-model"
    with pytest.raises(ValueError, match=r"unknown model 'Quen3-8B' \(did you mean 'Qwen3-8B'\?\)"):
        full_name("Quen3-8B")


def test_where_there_are_no_weights_they_are_random(tmp_path):
    model = find_model("Qwen3-0.6B")
    assert model.load_format == "dummy"
    folder = tmp_path / "mine"
    config_of("Qwen3-0.6B").save_pretrained(folder)
    assert find_model(str(folder)).load_format == "dummy"
    check(str(folder), 8, 131072)
    with pytest.raises(ValueError, match="was made for 131072 tokens, not 131073"):
        check(str(folder), 8, 131073)
    with pytest.raises(ValueError, match="world sizes that fit: 1, 2, 4, 8, 16"):
        check(str(folder), 3, 1)
    (folder / "model.safetensors").touch()
    assert find_model(str(folder)).load_format == "auto"
    tiny = find_model(f"{TINY}{folder}")
    assert tiny.load_format == "dummy"
    with open(f"{tiny.folder}/config.json") as file:
        assert json.load(file)["hidden_size"] == 64
