"""`tokenweave plan`, run as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tokenweave import embedded
from tokenweave.cli import main
from tokenweave.cli.plan_model import families, find_shape
from tokenweave.cost import predict_decode
from tokenweave.cost.hardware import as_json, find_hardware
from tokenweave.cost.published import PUBLISHED

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"
LLAMA = "Llama-3.3-70B"


@pytest.fixture
def plan(capfd, monkeypatch, tmp_path):
    """plan(*arguments) -> (exit code, stdout, stderr) of `tokenweave plan`, in this process and a fresh folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return main(["plan", *map(str, arguments)]), *capfd.readouterr()

    return run


def said(plan, *arguments):
    code, out, err = plan(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# -- what it says ------------------------------------------------------------------------------------------------------


def test_more_than_a_machine_says_how_it_is_taken(plan):
    said_of = {width: plan(LLAMA, "--tp", width)[1] for width in (8, 16)}
    assert "machines           16 GPUs are taken to be joined like 8 of one machine\n" in said_of[16]
    assert "machines" not in said_of[8]


def test_the_table_has_every_section(plan):
    what_if = ("--what-if", "link=0.5", "--what-if", "flops=2,bandwidth=1.5")
    code, out, err = plan(LLAMA, "--tp", 8, *what_if, "--explain", "2048@1024+64x1@500", "--ttft-ms", 50)
    assert (code, err) == (0, "")
    assert out.startswith("Llama-3.3-70B on 8 x h100-sxm, bfloat16\n")
    for text in (
        "workload           1 request at once, 2048 prompt tokens, 256 generated",
        "prefill waits for  compute: GEMM compute",
        "decode waits for   memory: reading weights",
        "overlap ",
        "TTFT target        50.0 ms, missed",
        "weights and workspace need 141.7 GB a GPU",
        "prefill of one prompt",
        "link x 0.5",
        "flops x 2, bandwidth x 1.5",
        "a step of 2112 tokens in 65 parts: weave at row",
        "are hidden",
    ):
        assert text in out
    assert max(map(len, out.splitlines())) < 180
    assert "rank" not in out


def test_what_there_is_room_for_is_no_longer_than_the_model_allows(plan):
    _, out, _ = plan(LLAMA, "--tp", 8)
    assert "such requests, or one of 131072, the model's longest\n" in out
    _, out, _ = plan(LLAMA, "--tp", 2)
    assert "such requests, or one as long as that\n" in out
    report = said(plan, "Gemma-2-9B")
    assert (report["max_len"], max(gain["tokens"] for gain in report["gains"])) == (8192, 8192)
    assert said(plan, "Mistral-Nemo-12B")["max_len"] is None


def test_json_is_all_of_stdout_and_says_what_the_model_says(plan):
    report = said(plan, LLAMA, "--tp", 8, "--prompt-len", 1024, "--output-len", 64, "--batch-size", 4)
    size = report["size"]
    assert (report["model"], report["hardware"], size["world_size"]) == (LLAMA, "h100-sxm", 8)
    decode_s = predict_decode(PUBLISHED[LLAMA], world_size=8, context_len=1056, batch_size=4, mode="off")
    assert size["serving"]["off"]["tpot_s"] == pytest.approx(decode_s)
    assert [one["world_size"] for one in report["sizes"]] == [1, 2, 4, 8]
    assert report["sizes"][0]["serving"]["auto"] is None
    assert (size["prefill_bound"], size["decode_bound"]) == ("compute", "memory")
    assert report["advice"]["fewest"] == 2
    gains = {gain["tokens"]: gain for gain in report["gains"]}
    assert gains[8192]["plan"]["mode"] == "weave"
    assert gains[8192]["planned"] > 1.1
    assert gains[128]["planned"] == 1.0


def test_without_tp_the_fewest_gpus_that_meet_the_targets_are_taken(plan):
    assert said(plan, LLAMA)["size"]["world_size"] == 2
    assert said(plan, LLAMA, "--ttft-ms", 150)["size"]["world_size"] == 4
    assert said(plan, LLAMA, "--request-rate", 4)["size"]["world_size"] == 4
    impossible = said(plan, LLAMA, "--tpot-ms", 0.1)
    assert (impossible["size"]["world_size"], impossible["advice"]["fewest"]) == (2, None)


def test_what_if_and_explain_in_json(plan):
    report = said(plan, LLAMA, "--tp", 4, "--what-if", "link=0.25", "--explain", "4096")
    (slower,) = report["what_if"]
    assert slower["factors"] == {"link": 0.25}
    assert slower["size"]["serving"]["off"]["ttft_s"] > report["size"]["serving"]["off"]["ttft_s"]
    one = report["explanation"]
    assert (one["rows"], one["chunks"]) == (4096, 1)
    assert 1 < one["candidates"] < 2500
    assert one["predicted_s"][one["taken"]["mode"]] == min(one["predicted_s"].values())
    assert one["reasons"]


def test_the_plot_is_a_png(plan, tmp_path):
    code, out, _ = plan(LLAMA, "--plot", "gain.png")
    assert code == 0
    assert out.endswith("plot               gain.png\n")
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the published curves are not at {REFERENCE}")
def test_measured_collectives(plan):
    ours, theirs = (said(plan, LLAMA, "--tp", 8, *more) for more in ((), ("--collectives", REFERENCE)))
    ratio = theirs["size"]["serving"]["off"]["ttft_s"] / ours["size"]["serving"]["off"]["ttft_s"]
    assert 0.9 < ratio < 1.1
    assert ratio != 1.0


# -- which model, which machine ----------------------------------------------------------------------------------------


def test_a_model_by_name_folder_or_config(tmp_path):
    assert find_shape("llama-3.3-70b", None) == (LLAMA, PUBLISHED[LLAMA])
    assert find_shape("meta-llama/Llama-3.3-70B-Instruct", None) == (LLAMA, PUBLISHED[LLAMA])
    assert find_shape("google/gemma-2-9b-it", "float16")[1].dtype == "float16"
    folder = embedded.path()
    assert find_shape(str(folder), None) == find_shape(str(folder / "config.json"), None)
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "architectures": ["LlamaForCausalLM"],
    }
    LlamaConfig(**sizes).save_pretrained(tmp_path / "mine")
    name, shape = find_shape(str(tmp_path / "mine" / "config.json"), None)
    assert (name, len(shape.layers), shape.hidden_size) == ("mine", 3, 256)


def test_models_are_listed_by_name_and_size(capsys):
    listed = families()
    assert listed == sorted(listed)
    assert {"Llama-2-7B/13B/70B", "Mistral-7B-v0.3", "Mixtral-8x7B/8x22B"} < set(listed)
    assert "Qwen3-0.6B/1.7B/4B/8B/14B/30B-A3B/32B/235B-A22B" in listed
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert all(family in text for family in listed)


def test_hardware_of_the_users_own(plan, tmp_path):
    values = {"like": "h100-sxm", "name": "roomy", "memory_bytes": 200e9}
    (tmp_path / "roomy.json").write_text(json.dumps(values))
    report = said(plan, LLAMA, "--hardware", "roomy.json")
    assert (report["hardware"], report["size"]["world_size"]) == ("roomy", 1)
    (tmp_path / "whole.json").write_text(json.dumps(as_json(find_hardware("a100"))))
    assert said(plan, LLAMA, "--hardware", "whole.json")["hardware"] == "a100"


def test_on_a_cpu_there_are_no_sms_to_share(plan):
    code, out, _ = plan("Qwen3-0.6B", "--hardware", "cpu", "--tp", 2, "--dtype", "float32", "--explain", 512)
    assert code == 0
    assert "SMs" not in out
    assert "GPU" not in out
    assert "memory of a rank " in out
    first, second = re.search(r"split so that both halves take about as long: (\d+) \+ (\d+) rows", out).groups()
    assert int(first) + int(second) == 512
    assert 256 <= int(first) < 300


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "unknown model 'Llama-3-70B' (did you mean 'Llama-3.3-70B'?); give a folder": ["Llama-3-70B"],
    "nowhere does not exist": ["./nowhere"],
    "is not named config.json": ["model.json"],
    "unknown hardware 'h10' (did you mean 'h100-sxm'?); known: h100-sxm": [LLAMA, "--hardware", "h10"],
    "the hardware file broken.json cannot be used": [LLAMA, "--hardware", "broken.json"],
    "--tp 3 cannot be: the model has 64 attention heads and 8 key-value heads, which 3 ranks cannot share evenly; ": [
        LLAMA,
        "--tp",
        "3",
    ],
    "argument --tp/--tensor-parallel-size: expected a whole number >= 1, got '0'": [LLAMA, "--tp", "0"],
    "on 1 x h100-sxm: weights and workspace need 141.7 GB a GPU, and 72.0 GB can be used; 2 x h100-sxm serve it": [
        LLAMA,
        "--tp",
        "1",
    ],
    "what serves it: 16 x h100-sxm by their memory, 8 x h200, 8 x b200": ["Llama-3.1-405B"],
    "do not fit: at most 2060 such requests, or 47 tokens each; nothing known serves it": [
        "Qwen2.5-7B",
        "--batch-size",
        "100000",
    ],
    "Gemma-2-9B was made for 8192 tokens, and a request has 8256; lower --prompt-len (8000) or --output-len (256)": [
        "Gemma-2-9B",
        "--prompt-len",
        "8000",
    ],
    "serves at most": [LLAMA, "--request-rate", "50"],
    "a100 has no peak for 'float8'; it has bfloat16": [LLAMA, "--hardware", "a100", "--dtype", "float8"],
    "expected factors from 0.001 to 1000 of flops, bandwidth, link, such as flops=2,link=0.5; got 'flop=2'": [
        LLAMA,
        "--what-if",
        "flop=2",
    ],
    "got 'link=-1'": [LLAMA, "--what-if", "link=-1"],
    "expected [COUNTx]TOKENS[@CONTEXT] with + between": [LLAMA, "--explain", "0"],
    "expected at most 131072 tokens in one step, got '9x1+9999999x1'": [LLAMA, "--explain", "9x1+9999999x1"],
    "got '2x'": [LLAMA, "--explain", "5+2x"],
    "argument --step-tokens: expected a whole number >= 128, got '1'": [LLAMA, "--step-tokens", "1"],
    "argument --prompt-len: expected a whole number >= 1, got '0'": [LLAMA, "--prompt-len", "0"],
    "argument --request-rate: not allowed with argument --batch-size": [
        LLAMA,
        "--batch-size",
        "8",
        "--request-rate",
        "4",
    ],
    "argument --request-rate: expected a number > 0 and at most 1e+09, got '-1'": [LLAMA, "--request-rate", "-1"],
    "argument --ttft-ms: expected a number > 0 and at most 1e+09, got 'nan'": [LLAMA, "--ttft-ms", "nan"],
    "--plot must name a .png file": [LLAMA, "--plot", "x.pdf"],
    "its folder does not exist": [LLAMA, "--plot", "no/x.png"],
    "tokenweave_figure_4.csv do not exist": [LLAMA, "--collectives", "no"],
    "unknown option --prompt-lenght, did you mean --prompt-len?": [LLAMA, "--prompt-lenght", "5"],
    "the following arguments are required: MODEL": [],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message, plan, tmp_path):
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "broken.json").write_text('{"sms": ')
    code, out, err = plan(*BAD[message])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("tokenweave: error: ")
    assert message in err


def test_an_unreachable_hub_id_says_why(plan, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = plan("someone/Llama-3.9-70B")
    assert code == 2
    assert "config.json of 'someone/Llama-3.9-70B' could not be downloaded" in err
    assert "did you mean 'Llama-3.3-70B'?" in err


NO_TORCH = """
import json, sys
from tokenweave.cli import main
code = main(["plan", "Llama-3.1-8B", "--json"])
print(json.dumps([code, [name for name in ("torch", "transformers", "matplotlib") if name in sys.modules]]))
"""


def test_a_published_model_is_planned_without_importing_torch():
    """Which takes seconds; the plan itself takes a fraction of one."""
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


def test_errors_are_one_line_without_torch_as_well():
    command = [sys.executable, "-m", "tokenweave.cli", "plan", "Llama-3.1-8B", "--hardware", "h10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tokenweave: error: unknown hardware 'h10'")


def test_it_needs_no_gpu_and_no_launcher():
    command = [sys.executable, "-m", "tokenweave.cli", "plan", "Llama-3.1-8B", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["size"]["world_size"] == 1
