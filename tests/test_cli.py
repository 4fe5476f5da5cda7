"""The command, run as a user runs it: on the embedded model, whose answers can be checked."""

import dataclasses
import functools
import importlib
import json
import operator
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser, parse_args

from tokenweave.cli import failure, generate, generate_options, main
from tokenweave.cli.entry import COMMANDS
from tokenweave.cli.figures import Run, count_woven, figures
from tokenweave.cli.setup import Setup
from tokenweave.cli.stdout import own_stdout
from tokenweave.cli.table import table
from tokenweave.comm.choice import Choice
from tokenweave.comm.group import PeerError
from tokenweave.comm.link import Link
from tokenweave.config import EngineConfig
from tokenweave.engine.memory import Memory
from tokenweave.outputs import CompletionOutput, RequestMetrics, RequestOutput
from tokenweave.sampling_params import SamplingParams
from tokenweave.trace.overlap import summary
from tokenweave.trace.spans import Span

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
TORCHRUN += ("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m")


# -- helpers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """command(*arguments, stdin="") -> (exit code, stdout, stderr) of `tokenweave generate`, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=""):
        (tmp_path / "stdin").write_text(stdin)
        with open(tmp_path / "stdin") as standard_input:
            monkeypatch.setattr(sys, "stdin", standard_input)
            code = main(["generate", *arguments])
        return code, *capfd.readouterr()

    return run


def start(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes, **options)


def run_process(*arguments, stdin="", **options):
    """(exit code, stdout, stderr) of `python -m arguments`."""
    process = start(*arguments, **options)
    try:
        out, err = process.communicate(stdin, timeout=TIMEOUT_S)
        return process.returncode, out, err
    finally:
        end(process)


def end(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def options_of(*arguments):
    return generate.parser().parse(arguments)


def completions(text):
    """{prompt: completion} of what is printed by default."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("> ")]
    return {block[0].removeprefix("> "): "\n".join(block[1:]) for block in blocks}


def rows(text):
    """{label: value} of the table."""
    lines = text.split("\n\n")[-1].splitlines()
    return {line[:17].strip(): line[17:] for line in lines}


# -- what can be said -------------------------------------------------------------------------------------------------


def test_every_field_has_an_option():
    engine = {option.field for option in (*generate_options.MODEL, *generate_options.ENGINE, *generate_options.OUTPUT)}
    assert engine | {"model", "link", "policy"} == {field.name for field in dataclasses.fields(EngineConfig)}
    sampling = {option.field for option in generate_options.SAMPLING}
    assert sampling == {field.name for field in dataclasses.fields(SamplingParams)}


def test_help_has_groups_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exited.value.code == 0
    for part in ("model:", "prompts:", "sampling:", "engine:", "output:", "examples:", "the embedded model"):
        assert part in text
    assert "together (default: 2048)" in text
    assert "for a prompt; none: up to the model's length (default: 32)" in text
    assert "simulate a link" in text


def test_the_top_level_names_its_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "generate   complete prompts" in capsys.readouterr().out


def test_defaults_are_those_of_the_dataclasses():
    options = options_of()
    config, params = generate.engine_config(options), generate.sampling_params(options)
    assert config == EngineConfig(model=config.model, progress=config.progress)
    assert params == SamplingParams(temperature=0.0, max_tokens=32)


def test_options_reach_their_fields():
    engine = "--tensor-parallel-size 2 --dtype bfloat16 --device cpu --overlap weave --max-num-batched-tokens 7"
    engine += " --seed 5 --max-num-seqs 3 --max-model-len 9 --block-size 4 --num-kv-blocks 6 --no-prefix-caching"
    engine += " --timeout-s 30 --link-gbit-per-s 8 --link-latency-us 2 --no-progress --model x --load-format dummy"
    engine += " --async-scheduling --gpu-memory-utilization 0.5 --enforce-eager --cuda-graph-max-tokens 33"
    assert generate.engine_config(options_of(*engine.split())) == EngineConfig(
        model="x",
        tensor_parallel_size=2,
        dtype="bfloat16",
        device="cpu",
        load_format="dummy",
        overlap="weave",
        max_num_batched_tokens=7,
        seed=5,
        max_num_seqs=3,
        max_model_len=9,
        block_size=4,
        num_kv_blocks=6,
        gpu_memory_utilization=0.5,
        async_scheduling=True,
        enforce_eager=True,
        cuda_graph_max_tokens=33,
        enable_prefix_caching=False,
        timeout_s=30.0,
        link=Link(1e9, 2e-6),
        progress=False,
    )
    assert generate.engine_config(options_of("--no-async-scheduling")).async_scheduling is False
    sampling = "--temperature 0.5 --max-tokens none --min-tokens 2 -n 3 --top-p 0.9 --top-k 4 --min-p 0.1 --logprobs 2"
    sampling += " --request-seed -7 --stop a --stop b --stop-token-id 3 --ignore-eos --include-stop"
    sampling += " --no-skip-special-tokens --repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 0.5"
    assert generate.sampling_params(options_of(*sampling.split())) == SamplingParams(
        temperature=0.5,
        max_tokens=None,
        min_tokens=2,
        n=3,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        logprobs=2,
        seed=-7,
        stop=["a", "b"],
        stop_token_ids=[3],
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_torchrun_takes_no_option_for_an_abbreviation_of_its_own(command):
    """It refuses one that begins several of its own, as --n does, even after -m tokenweave.cli generate."""
    options = set(importlib.import_module(f"tokenweave.cli.{command}").parser()._option_string_actions)
    theirs = set(get_args_parser()._option_string_actions)
    assert not {(ours, their) for ours in options - theirs for their in theirs if their.startswith(ours)}
    words = [word for option in sorted(options) for word in (option, "x")]
    assert parse_args(["-m", "tokenweave.cli", command, *words]).training_script_args == [command, *words]


def test_prompts_and_options_mix():
    options = options_of("a", "--max-tokens", "3", "b", "--json", "--", "--c")
    assert (options.prompts, options.max_tokens, options.json) == (["a", "b", "--c"], 3, True)


# -- what is printed --------------------------------------------------------------------------------------------------


def test_without_prompts_the_embedded_model_adds(command):
    code, out, err = command()
    said = completions(out)
    assert (code, err) == (0, "")
    assert len(said) >= 3
    assert all(answer == str(sum(map(int, sum_.rstrip("=").split("+")))) for sum_, answer in said.items())
    assert f"{len(said)} (" in rows(out)["prompts"]
    assert "tokens/s" in rows(out)["generated"]
    assert "max" in rows(out)["TTFT"]
    assert rows(out)["communication"].startswith("none: one rank")


def test_json_is_all_of_stdout(command):
    code, out, _ = command("12+34=", "7+8=", "--json", "--logprobs", "1", "--temperature", "1", "-n", "2")
    said = json.loads(out)
    assert code == 0
    assert [output["prompt"] for output in said["outputs"]] == ["12+34=", "7+8="]
    assert all(len(output["completions"]) == 2 and output["ttft_s"] > 0 for output in said["outputs"])
    first = said["outputs"][0]["completions"][0]
    assert [entry["token_id"] for entry in first["logprobs"][0]].count(first["token_ids"][0]) == 1
    counted = sum(len(each["token_ids"]) for output in said["outputs"] for each in output["completions"])
    assert said["figures"]["generated_tokens"] == counted
    assert said["communication"] is None


def test_prompts_come_from_arguments_standard_input_and_files_in_order(command, tmp_path):
    (tmp_path / "sums.txt").write_text("\n5+5=\n\n6+6=\n")
    code, out, _ = command("1+1=", "-", "4+4=", "--prompts-file", "sums.txt", stdin="2+2=\n3+3=")
    assert code == 0
    assert list(completions(out).items()) == [(f"{i}+{i}=", f"{2 * i}") for i in range(1, 7)]


def test_chat_applies_the_template(command):
    code, out, _ = command("--chat", "20+22=", "--json")
    (output,) = json.loads(out)["outputs"]
    assert (code, output["prompt"], output["completions"][0]["text"]) == (0, "20+22=", "42")


def test_one_streamed_completion_is_raw(command):
    code, out, _ = command("--stream", "12+34=")
    assert (code, out.split("\n\n")[0]) == (0, "46")


def test_several_streamed_completions_carry_their_index(command):
    code, out, _ = command("--stream", "12+34=", "7+8=")
    lines = out.split("\n\n")[0].splitlines()
    assert code == 0
    assert {"[0] > 12+34=", "[1] > 7+8="} < set(lines)
    for index, answer in (("[0] ", "46"), ("[1] ", "15")):
        mine = [line.removeprefix(index) for line in lines if line.startswith(index)]
        assert "".join(mine[1:]) == answer


def test_streamed_json_lines_add_up(command):
    code, out, _ = command("--stream", "--json", "12+34=", "7+8=")
    *pieces, last = map(json.loads, out.splitlines())
    for index, output in enumerate(last["outputs"]):
        mine = [piece for piece in pieces if piece["prompt"] == index]
        (completion,) = output["completions"]
        assert "".join(piece["text"] for piece in mine) == completion["text"]
        assert functools.reduce(operator.iadd, (piece["token_ids"] for piece in mine), []) == completion["token_ids"]
        assert mine[-1]["finish_reason"] == completion["finish_reason"] == "stop"
    assert code == 0


def test_libraries_that_print_do_not_spoil_standard_output(capfd):
    with own_stdout(speaks=True) as out:
        os.write(1, b"[Gloo] hello\n")
        out.write("{}\n")
    os.write(1, b"after\n")
    with own_stdout(speaks=False) as out:
        out.write("another rank\n")
    assert capfd.readouterr() == ("{}\nafter\n", "[Gloo] hello\n")


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "unknown option --temprature, did you mean --temperature?": ["--temprature", "1"],
    "unknown option --n, did you mean -n?": ["--n", "2"],
    "argument --top-p: invalid float value: 'x'": ["--top-p", "x"],
    "argument --max-tokens: invalid int or none value: 'few'": ["--max-tokens", "few"],
    "argument --overlap: invalid choice: 'wave'": ["--overlap", "wave"],
    "top_p is 2.0; expected": ["--top-p", "2"],
    "max_tokens is 0; expected": ["--max-tokens", "0"],
    "temperature is -1.0; expected": ["--temperature", "-1"],
    "n is 2; expected 1 when temperature is 0": ["-n", "2"],
    "block_size must be": ["--block-size", "0"],
    "prompts file 'nowhere' cannot be read: No such file": ["--prompts-file", "nowhere"],
    "prompts in 'latin' are not UTF-8": ["--prompts-file", "latin"],
    "there is no prompt in 'empty'": ["--prompts-file", "empty"],
    "there is no prompt on standard input": ["-"],
    "there is no prompt; give prompts as arguments": ["--model", "some/model"],
    "model folder '/no/such/folder' does not exist": ["--model", "/no/such/folder", "a"],
    "has no config.json": ["--model", ".", "a"],
    "prompt 1 has 6 tokens, which leaves no room": ["--max-model-len", "6", "1+1=", "12345"],
    "--link-latency-us is of a simulated link": ["--link-latency-us", "5"],
    "a link needs bandwidth_bytes_per_s > 0": ["--link-gbit-per-s", "0"],
    "trace must name a .json file": ["--trace", "x.png"],
    "trace='no/x.json' cannot be written": ["--trace", "no/x.json"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message, command, tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff\n")
    (tmp_path / "empty").write_text("\n \n")
    code, out, err = command(*BAD[message])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("tokenweave: error: ")
    assert message in err


def test_a_command_is_needed(capsys):
    assert main([]) == main(["frobnicate"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "a command is needed: one of generate, " in first
    assert "frobnicate" in second


def test_other_ranks_stay_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(failure, "RANK_0_FIRST_S", 0.0)
    assert main(["generate", "--top-p", "2"]) == 2
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert capsys.readouterr() == ("", "")


def test_failures_are_told_from_bad_input(capsys, monkeypatch):
    monkeypatch.setattr(failure, "RANK_0_FIRST_S", 0.0)
    assert failure.report(PeerError("rank 1 failed\nin loading"), 0) == 1
    assert failure.report(PeerError("rank 1 failed in loading"), 1) == 1
    assert failure.report(OSError("disk full"), 1) == 1
    assert failure.report(KeyboardInterrupt(), 0) == 130
    assert capsys.readouterr().err.splitlines() == [
        "tokenweave: error: rank 1 failed in loading",
        "tokenweave: rank 1: error: OSError: disk full",
        "tokenweave: interrupted",
    ]


def test_an_unexpected_error_says_where(capsys):
    def divide():
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as raised:
        divide()
    assert failure.report(raised.value, 0) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "return 1 / 0" in "".join(lines[:-1])
    assert lines[-1] == "tokenweave: error: ZeroDivisionError: division by zero"


# -- the figures ------------------------------------------------------------------------------------------------------


def output_of(arrival_s, first_token_s, finished_s, tokens, reason="stop"):
    metrics = RequestMetrics(arrival_s, arrival_s, first_token_s, finished_s, cached_tokens=2, preemptions=1)
    return RequestOutput("0", "x", [1, 2, 3], [CompletionOutput(0, "y", tokens, finish_reason=reason)], True, metrics)


def span(step, half, lane, kind, start_ns, end_ns):
    return Span(0, step, lane, kind, half, "attn", start_ns, end_ns, phase="prefill")


MEMORY = Memory(80 << 30, 15 << 30, 1 << 30, 2 << 30, block_bytes=2 << 20, block_size=16, blocks=28_000)
COMM = Choice("sharded", "rank 0 computes on the CPU")
SPANS = [
    span(1, 0, "compute", "segment", 0, 40_000_000),
    span(1, 1, "comm", "sum", 10_000_000, 50_000_000),
    span(1, 1, "compute", "wait", 40_000_000, 50_000_000),
    span(2, 0, "compute", "segment", 60_000_000, 70_000_000),
]
OUTPUTS = [output_of(10.0, 10.5, 12.0, [1, 2, 3]), output_of(10.0, 11.5, 14.0, [4], "length")]

PLANS = "what was tuned at 128, 256 rows"


def run_of(spans=(), **options):
    world_size = options.pop("world_size", 2)
    overlap = summary(spans) if options.get("trace") else None
    config = EngineConfig(model="m", **options)
    setup = Setup(config, (config.overlap,), world_size, "cpu", COMM, MEMORY, PLANS, "some-cpu")
    return Run(setup, ["a", "b"], OUTPUTS, figures(OUTPUTS), overlap, count_woven(spans))


def test_figures_count_and_time():
    found = figures(OUTPUTS)
    assert (found.prompts, found.prompt_tokens, found.generated_tokens) == (2, 6, 4)
    assert (found.seconds, found.tokens_per_s, found.ttft_mean_s, found.ttft_max_s) == (4.0, 1.0, 1.0, 1.5)
    assert (found.stopped, found.cut_short, found.cached_tokens, found.preemptions) == (1, 1, 4, 2)


def test_the_table_says_how_much_was_hidden_and_where_the_timeline_is():
    said = rows("\n\n" + table(run_of(SPANS, trace="out/t.json")))
    assert said["communication"].startswith("75 % hidden: 30.0 ms of 40.0 ms, 10.0 ms exposed")
    assert said["prefill"].startswith("75 % hidden")
    assert said["woven"] == "1 of 2 steps"
    assert "out/t.json" in said["timeline"]
    assert "out/t.png" in said["timeline"]


def test_the_table_says_what_plans_go_by():
    assert rows("\n\n" + table(run_of()))["plans"] == f"by {PLANS}"
    assert "plans" not in rows("\n\n" + table(run_of(overlap="off")))
    assert "plans" not in rows("\n\n" + table(run_of(world_size=1)))


def test_the_table_says_what_memory_is_for():
    said = rows("\n\n" + table(run_of()))
    assert said["memory"] == (
        "80.0 GiB: weights 15.0 GiB, activations 1.0 GiB, KV cache 54.7 GiB = 28,000 blocks = 448,000 tokens, "
        "others 2.0 GiB"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"overlap": "weave", "world_size": 1}, "none: one rank has nothing to communicate, so --overlap weave hid"),
        ({"overlap": "weave"}, "not measured; --trace FILE"),
        ({"overlap": "weave", "trace": "t.json"}, "none in this run"),
    ],
)
def test_the_table_says_plainly_when_nothing_was_hidden(options, expected):
    run = run_of(**options)
    assert rows("\n\n" + table(run))["communication"].startswith(expected)


def test_the_table_labels_a_simulated_link():
    said = rows("\n\n" + table(run_of(link=Link(1.25e8, 5e-5))))
    assert said["simulated link"].startswith("1 Gbit/s, 50 us: all times")


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_plain_process_starts_the_ranks_and_writes_a_timeline(tmp_path):
    link = "--link-gbit-per-s 10 --link-latency-us 5"
    options = f"--tensor-parallel-size 2 --overlap weave --trace line.json {link}".split()
    code, out, err = run_process("tokenweave.cli", "generate", "12+34=", "7+8=", *options, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert completions(out) == {"12+34=": "46", "7+8=": "15"}
    assert "hidden" in rows(out)["communication"]
    assert "hidden" in rows(out)["prefill"]
    assert rows(out)["ranks"].startswith("2 on cpu")
    assert "simulat" in rows(out)["simulated link"]
    assert json.loads((tmp_path / "line.json").read_text())["traceEvents"]
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")


def test_torchrun_reads_standard_input_once_and_prints_once(tmp_path):
    arguments = [*TORCHRUN, "tokenweave.cli", "generate", "-", "--overlap", "auto", "--json", "--trace", "line.json"]
    code, out, _ = run_process(*arguments, stdin="12+34=\n7+8=\n", cwd=tmp_path)
    said = json.loads(out)
    texts = [output["completions"][0]["text"] for output in said["outputs"]]
    assert (code, said["world_size"], texts) == (0, 2, ["46", "15"])
    # The trial steps that overlap=auto times when it starts are no part of the timeline: it has one step a token.
    assert said["communication"]["steps"] == 3
    assert said["communication"]["communication_s"] > 0


def test_torchrun_reports_bad_input_once():
    code, out, err = run_process(*TORCHRUN, "tokenweave.cli", "generate", "--prompts-file", "nowhere")
    said = [line for line in err.splitlines() if line.startswith("tokenweave:")]
    assert code != 0
    assert out == ""
    assert len(said) == 1
    assert "prompts file 'nowhere' cannot be read" in said[0]


ENDLESS = ["--ignore-eos", "--max-tokens", "200", "--stream", "--prompts-file", "many.txt"]


@pytest.fixture
def endless(tmp_path):
    """endless(*options) -> a process that has begun to print, and would go on for minutes."""
    (tmp_path / "many.txt").write_text("1+1=\n" * 2000)
    processes = []

    def begin(*options):
        processes.append(start("tokenweave.cli", "generate", *ENDLESS, *options, cwd=tmp_path))
        assert processes[-1].stdout.readline().startswith("[0]")
        return processes[-1]

    yield begin
    for process in processes:
        end(process)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the other rank in /proc")
def test_ctrl_c_ends_all_ranks_with_one_line(endless):
    process = endless("--tensor-parallel-size", "2")
    (worker,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, "tokenweave: interrupted\n")
    assert not Path(f"/proc/{worker}").exists()


def test_a_reader_that_goes_away_is_no_error(endless):
    process = endless()
    process.stdout.close()
    assert (process.wait(TIMEOUT_S), process.stderr.read()) == (141, "")
