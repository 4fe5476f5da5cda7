"""What is quoted of the paper, and what is read of its files."""

import pytest

from perf.paper.published import LLAMA, Key, published, quoted

FILES = {
    "figure_11b.csv": "model,prompt_len,baseline_multimem,no_ar,overlap_fused\nQwen2.5-72B-Instruct,64,4.0,3.0,2.0\n",
    "tokenweave_figure_12a.csv": "model,experiment,baseline_multimem,no_ar,overlap_fused\n"
    'Mixtral-8x22B-Instruct-v0.1,"(512, 128)",1.0,3.0,2.0\n',
    "figure_13.csv": "chunk_size,experiment,baseline_multimem,no_ar,overlap_fused\n512,ShareGPT,1.0,3.0,2.0\n",
    "tokenweave_figure_4.csv": "BL,hidden_size,full_rms_norm_us,fused_arln_us\n64,8192,8.0,9.0\n",
    "figure_10.csv": "num_tokens,hidden_size,num_tokens_per_gpu,fused_arln_us_ctas_2\n64,8192,18.0,23.0\n",
    "figure_7.csv": "not,one,of,ours\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_quotes_agree_with_each_other():
    known = quoted()
    assert known[Key("1", LLAMA, 8, 8192, "off")] == pytest.approx(1 - 289.5 / 356.0)
    assert (
        known[Key("12", LLAMA, 8, "sharegpt", "weave", 2048)] == known[Key("13", LLAMA, 8, "sharegpt", "weave", 2048)]
    )
    assert {key.figure for key in known} == {"1", "4", "10", "11", "12", "13"}


def test_files_add_to_the_quotes(folder):
    known = published(folder)
    assert known.items() >= quoted().items()
    assert known[Key("11", "Qwen2.5-72B", 4, 64, "nocomm")] == 3.0
    assert known[Key("1", "Qwen2.5-72B", 4, 64, "off")] == 0.25
    assert known[Key("12", "Mixtral-8x22B", 8, "512-128", "weave", 4096)] == 2.0
    assert known[Key("13", LLAMA, 8, "sharegpt", "off", 512)] == 1.0
    assert known[Key("4", "", 8, 64, "full_rms_norm_us")] == 8.0
    assert known[Key("10", "", 8, 64, "fused_arln_us_ctas_2")] == 23.0


def test_what_cannot_be_read_is_said(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        published(tmp_path / "missing")
    (folder / "figure_13.csv").write_text("chunk_size,experiment\nmany,ShareGPT\n")
    with pytest.raises(ValueError, match=r"figure_13\.csv is not as published"):
        published(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no"):
        published(tmp_path / "empty")
