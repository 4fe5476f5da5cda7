"""Bad input: one line that says what was wrong, what was expected and what to do; of one kind on every rank, with no
rank left waiting; and what had been there before still works."""

import copy
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from tests.checkpoints import VOCAB_SIZE
from tokenweave import LLM, SamplingParams
from tokenweave.comm.group import PeerError
from tokenweave.engine import runner
from tokenweave.models import decoder
from tokenweave.models.shards import CheckpointError
from tokenweave.weave.lanes import ThreadLane

OPTIONS: dict[str, Any] = {
    "overlap": "weave",
    "num_kv_blocks": 4,
    "block_size": 8,
    "max_model_len": 48,
    "progress": False,
    "timeout_s": 60.0,
}
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
HELLO = list(b"hello")


@dataclasses.dataclass(frozen=True)
class Raised:
    kind: type[BaseException]
    text: str


def raised_by(call: Callable[[], Any]) -> Raised | None:
    try:
        call()
    except Exception as error:
        return Raised(type(error), str(error))
    return None


def open_and_close(model: Path | str, options: dict[str, Any]) -> None:
    LLM(model, **OPTIONS | options).close()


# -- options and models -----------------------------------------------------------------------------------------------


def try_to_open(model: Path | str, options: dict[str, Any], good: Path) -> tuple[Raised | None, list[int]]:
    """What opening raises, and what an LLM then generates that is opened rightly."""
    raised = raised_by(lambda: open_and_close(model, options))
    with LLM(good, **OPTIONS) as llm:
        return raised, llm.generate(HELLO, GREEDY)[0].outputs[0].token_ids


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"blocksize": 16}, TypeError, r"LLM has no option 'blocksize'; did you mean 'block_size'\?"),
    "unlike any": ({"zzz": 1}, TypeError, r"LLM has no option 'zzz'; the options are .*block_size.*"),
    "overlap": ({"overlap": "x"}, ValueError, r"overlap must be one of auto, off, fused, weave, got 'x'"),
    "dtype": ({"dtype": "int8"}, ValueError, r"dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    "attention": ({"device": "cpu", "attention": "triton"}, ValueError, r"attention='triton' cannot run here: .*; .*"),
    "device": ({"device": "tpu"}, ValueError, r"device must be one of auto, cpu, cuda, got 'tpu'"),
    "block_size 0": ({"block_size": 0}, ValueError, r"block_size must be a whole number >= 1, got 0"),
    "block_size 1.5": ({"block_size": 1.5}, ValueError, r"block_size must be a whole number >= 1, got 1.5"),
    "block_size True": ({"block_size": True}, ValueError, r"block_size must be a whole number >= 1, got True"),
    "num_kv_blocks 0": ({"num_kv_blocks": 0}, ValueError, r"num_kv_blocks must be a whole number >= 1, got 0"),
    "num_kv_blocks huge": ({"num_kv_blocks": 10**12}, ValueError, r"there is no memory for .* KV blocks .*; lower .*"),
    "max_num_seqs": ({"max_num_seqs": -1}, ValueError, r"max_num_seqs must be a whole number >= 1, got -1"),
    "max_model_len 0": ({"max_model_len": 0}, ValueError, r"max_model_len must be a whole number >= 1, got 0"),
    "max_model_len": ({"max_model_len": 1025}, ValueError, r"max_model_len is 1025, but the model .* 1024 tokens.*"),
    "tokens a step": ({"max_num_batched_tokens": "9"}, ValueError, r"max_num_batched_tokens must be .*, got '9'"),
    "timeout_s": ({"timeout_s": 0}, ValueError, r"timeout_s must be .*, got 0"),
    "timeout_s text": ({"timeout_s": "60"}, ValueError, r"timeout_s must be .*, got '60'"),
    "link": ({"link": 1e9}, ValueError, r"link must be a tokenweave.comm.link.Link or None, got .*"),
    "seed": ({"seed": "x"}, ValueError, r"seed must be .*, got 'x'"),
    "caching": ({"enable_prefix_caching": "no"}, ValueError, r"enable_prefix_caching must be .*, got 'no'"),
    "world size": ({"tensor_parallel_size": 3}, ValueError, r"tensor_parallel_size=3, but .* one of 2 .*; .*"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_be(ranks, checkpoint, case):
    options, kind, pattern = BAD_OPTIONS[case]
    check_refused(ranks(2), checkpoint("llama"), options, kind, pattern, checkpoint("llama"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(ranks, checkpoint):
    pattern = r"device='cuda', but torch sees no CUDA device; install a CUDA build of torch, or use device='cpu'"
    check_refused(ranks(2), checkpoint("llama"), {"device": "cuda"}, ValueError, pattern, checkpoint("llama"))


def check_refused(pool, model, options: dict[str, Any], kind: type, pattern: str, good: Path) -> None:
    before = list(pool.pids)
    results = pool.run(try_to_open, model, options, good, timeout_s=60)
    assert not before or before == pool.pids, "the ranks did not survive"
    for raised, generated in results:
        assert raised is not None, "nothing was raised"
        assert issubclass(raised.kind, kind), raised
        check_one_line(raised.text, pattern)
        assert generated == results[0][1]


def check_one_line(text: str, pattern: str) -> None:
    assert "\n" not in text
    assert re.fullmatch(rf"(rank \d: )?{pattern}", text), text


def without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return r"model folder '.*' has no config.json; expected a Hugging Face model folder \(.*\)"


def config_of_no_json(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama", ')
    return r".*config.json.*; .*"


def unknown_architecture(folder: Path) -> str:
    edit_config(folder, architectures=["LamaForCausalLM"])
    return r".*config.json asks for the architecture LamaForCausalLM \(did you mean LlamaForCausalLM\?\); supported .*"


def unknown_model_type(folder: Path) -> str:
    edit_config(folder, model_type="no_such_model", architectures=["NoSuchModel"])
    return r".*config.json cannot be used: .*no_such_model.*; supported architectures: .*"


def without_weights(folder: Path) -> str:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return r".* holds no \*\.safetensors file; download or copy the weights into it, or .*dummy'"


def without_a_shard(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    return rf".*index.json names the file {shard.name}, which is not there; download or copy the missing file"


def truncated(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return rf"cannot read .*{shard.name} \(.*\): with {shard.stat().st_size} bytes it is truncated or .*"


def without_a_tensor(folder: Path) -> str:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    return rf"checkpoint .* has no tensor '{name}'; nearest are '.*'; check that config.json belongs to these weights"


def tensor_of_another_shape(folder: Path) -> str:
    edit_config(folder, intermediate_size=104)
    return r"tensor '.*' in .* has shape \[.*\], expected \[.*\]; check that config.json belongs to these weights"


def quantised(folder: Path) -> str:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype=torch.int8)}))
    return rf"tensor '{name}' in .* is I8; expected one of .*: .* not supported, use the unquantised one"


def config_that_contradicts_itself(folder: Path) -> str:
    edit_config(folder, num_attention_heads=6)
    return r".*config.json cannot be used: .*not a multiple of the number of attention heads.*; supported .*"


BAD_MODELS: list[Callable[[Path], str]] = [
    without_config,
    config_of_no_json,
    unknown_architecture,
    unknown_model_type,
    without_weights,
    without_a_shard,
    truncated,
    without_a_tensor,
    tensor_of_another_shape,
    quantised,
    config_that_contradicts_itself,
]


def edit_config(folder: Path, **edits: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edits))


def rewrite(folder: Path, edit: Callable[[dict], Any]) -> None:
    """The folder's weights, edited, in one file without an index."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  (no mapping)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("spoil", BAD_MODELS, ids=lambda spoil: spoil.__name__)
def test_models_that_cannot_be(ranks, checkpoint, tmp_path, spoil):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    pattern = spoil(folder)
    check_refused(ranks(2), folder, {}, ValueError, pattern, checkpoint("llama"))


def test_heads_that_two_ranks_cannot_share(ranks, checkpoint):
    pattern = r"the model has 6 attention heads and 3 key-value heads, which 2 ranks cannot .*; .* that fit: 1, 3, 6"
    check_refused(ranks(2), checkpoint("llama_six_heads"), {}, ValueError, pattern, checkpoint("llama"))


@pytest.mark.parametrize("model", ["./no/such/folder", "/no such folder", "a/b/c"])
def test_models_that_are_not_there(ranks, checkpoint, model):
    pattern = r"model folder '.*' does not exist; give a folder or a hub id 'org/name'"
    check_refused(ranks(2), model, {}, ValueError, pattern, checkpoint("llama"))


# -- requests ---------------------------------------------------------------------------------------------------------

BAD_REQUESTS: dict[str, tuple[Any, Any, type[Exception] | tuple[type[Exception], ...], str]] = {
    "no prompts": ([], GREEDY, ValueError, r"prompts is empty; .*"),
    "empty text": ("", GREEDY, ValueError, r"prompt 0 is empty; expected at least one .*; .*"),
    "empty ids": ([[]], GREEDY, ValueError, r"prompt 0 is empty; expected at least one .*; .*"),
    "no prompt": (None, GREEDY, TypeError, r"prompts must be str, list\[str\], .*, got .*"),
    "a number": (7, GREEDY, TypeError, r"prompts must be str, .*, got .*"),
    "floats": ([1.0, 2.0], GREEDY, TypeError, r"prompt 0 .* float.*"),
    "bools": ([[True]], GREEDY, TypeError, r"prompt 0 .* bool .*"),
    "bytes": (b"hello", GREEDY, TypeError, r"prompts must be str, .*, got .*"),
    "too long": ([1] * 48, GREEDY, ValueError, r"prompt 0 has 48 tokens, .* max_model_len=48; shorten it .*"),
    "id too large": ([1, VOCAB_SIZE], GREEDY, ValueError, r"prompt 0 has token id 259; expected 0 <= id < 259, .*"),
    "id below zero": ([-1], GREEDY, ValueError, r"prompt 0 has token id -1; expected 0 <= id < 259, .*"),
    "id of 100 bits": ([1 << 100], GREEDY, ValueError, r"prompt 0 has token id 1267.*; expected 0 <= id < 259, .*"),
    "blocks": ([1] * 30, GREEDY, ValueError, r"prompt 0 needs KV blocks for 34 tokens .* holds 32; .*num_kv_blocks.*"),
    "lone surrogate": ("\ud800", GREEDY, (TypeError, ValueError), r".*"),
    "params": (HELLO, {"temperature": 0}, TypeError, r"sampling_params must be a SamplingParams.*, got .*"),
    "two params": (HELLO, [GREEDY] * 2, ValueError, r".* 1 prompt.* 2 sampling_params; .*"),
    "stop id": (HELLO, SamplingParams(stop_token_ids=[259]), ValueError, r".*stop_token_ids .*259; expected .*"),
    "second of three": ([HELLO, [300], HELLO], GREEDY, ValueError, r"prompt 1 has token id 300; .*"),
    "last of three": ([HELLO, "x", ""], GREEDY, ValueError, r"prompt 2 is empty; .*"),
    "a type among three": ([HELLO, 3.5, "x"], GREEDY, TypeError, r"prompt 1 .* float.*"),
}
BAD_CHATS: dict[str, tuple[Any, type[Exception], str]] = {
    "no messages": ([], ValueError, r"prompts is empty; .*"),
    "nothing": (None, TypeError, r"messages must be a list .*, got None"),
    "text": ("hi", TypeError, r"messages must be a list .*, got 'hi'"),
    "numbers": ([1, 2], TypeError, r"messages must be a list .*, got \[1, 2\]"),
    "text among messages": ([{"role": "user", "content": "hi"}, "hi"], TypeError, r"messages must be a list .*"),
}


def try_requests(folder: Path, stream: bool) -> dict[str, tuple[Raised | None, bool]]:
    """For each bad request: what it raises, and whether a good call before and after it are equal, with no step run
    and nothing changed in between."""
    with LLM(folder, **OPTIONS) as llm:
        steps = count_steps(llm)
        first = llm.generate(HELLO, GREEDY)[0].outputs[0].token_ids

        def attempt(call: Callable[[], Any]) -> tuple[Raised | None, bool]:
            before = len(steps)
            raised = raised_by(call)
            untouched = before == len(steps)
            return raised, untouched and llm.generate(HELLO, GREEDY)[0].outputs[0].token_ids == first

        results = {}
        for name, (prompts, params, *_) in BAD_REQUESTS.items():
            given = copy.deepcopy((prompts, params))
            result, good = attempt(lambda: llm.generate(prompts, params, stream=stream))  # noqa: B023  (called at once)
            results[name] = result, good and given == (prompts, params)
        for name, (messages, *_) in BAD_CHATS.items():
            results[f"chat: {name}"] = attempt(lambda: llm.chat(messages, stream=stream))  # noqa: B023
        return results


def count_steps(llm: LLM) -> list[Any]:
    steps, forward = [], llm._runner.forward
    llm._runner.forward = lambda *step: steps.append(step) or forward(*step)
    return steps


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_requests_that_cannot_be(ranks, checkpoint, stream):
    results = ranks(2).run(try_requests, checkpoint("llama"), stream, timeout_s=100)
    expected = {name: (kind, pattern) for name, (_, _, kind, pattern) in BAD_REQUESTS.items()}
    expected |= {f"chat: {name}": (kind, pattern) for name, (_, kind, pattern) in BAD_CHATS.items()}
    for name, (kind, pattern) in expected.items():
        for of_rank in results:
            raised, good = of_rank[name]
            assert raised is not None, f"{name}: nothing was raised"
            assert issubclass(raised.kind, kind), f"{name}: {raised}"
            check_one_line(raised.text, pattern)
            assert raised == results[0][name][0], f"{name}: ranks differ"
            assert good, f"{name}: it left something behind"


BAD_PARAMS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": (
        {"temprature": 1},
        TypeError,
        r"SamplingParams has no option 'temprature'; did you mean 'temperature'\?",
    ),
    "max_tokens": ({"max_tokens": -1}, ValueError, r"max_tokens is -1; expected an int >= 1 or None; .*"),
    "max_tokens 0": ({"max_tokens": 0}, ValueError, r"max_tokens is 0; expected an int >= 1 or None; .*"),
    "temperature": ({"temperature": -0.1}, ValueError, r"temperature is -0.1; expected a number >= 0; .*"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, r"temperature is nan; expected a finite .*; .*"),
    "top_p 0": ({"top_p": 0.0}, ValueError, r"top_p is 0.0; expected a number in \(0, 1\]; .*"),
    "top_p 1.1": ({"top_p": 1.1}, ValueError, r"top_p is 1.1; expected a number in \(0, 1\]; .*"),
    "n": ({"n": 0}, ValueError, r"n is 0; expected an int >= 1; .*"),
    "greedy n": ({"n": 2, "temperature": 0}, ValueError, r"n is 2; expected 1 when temperature is 0 .*; .*"),
    "stop": ({"stop": [""]}, ValueError, r"stop is \[''\]; expected non-empty strings; .*|stop is .*"),
    "seed": ({"seed": 1 << 63}, ValueError, r"seed is .*; expected a 64-bit signed int; .*"),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_params_that_cannot_be(case):
    options, kind, pattern = BAD_PARAMS[case]
    raised = raised_by(lambda: SamplingParams(**options))
    assert raised is not None
    assert raised.kind is kind
    check_one_line(raised.text, pattern)


def test_text_without_a_tokenizer(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder, ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    with LLM(folder, **OPTIONS) as llm:
        message = r"^prompt 0 is text, but the model folder has no tokenizer; add one, or pass token ids .*$"
        with pytest.raises(ValueError, match=message):
            llm.generate("hello")
        with pytest.raises(ValueError, match=r" has no chat template; use generate with text of your own form$"):
            llm.chat([{"role": "user", "content": "hi"}])
        assert len(llm.generate(HELLO, GREEDY)[0].outputs[0].token_ids) == 5


def test_the_smallest_cache(checkpoint):
    """One block of one token holds a prompt of one token, and one new token, whose keys nobody needs."""
    with LLM(checkpoint("llama"), **OPTIONS | {"num_kv_blocks": 1, "block_size": 1}) as llm:
        assert len(llm.generate([1], SamplingParams(max_tokens=1))[0].outputs[0].token_ids) == 1
        with pytest.raises(ValueError, match=r"^prompt 0 needs KV blocks for 2 tokens .* the cache holds 1; raise "):
            llm.generate([1, 2], SamplingParams(max_tokens=1))


# -- one rank only ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one rank: what it raised, after how long, what the LLM says afterwards, and what a new one generates."""

    raised: Raised | None
    seconds: float
    afterwards: Raised | None
    generated: list[int]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` raises, kept as an interactive session keeps it: with all that its traceback refers to."""
    start_s = time.monotonic()
    try:
        call()
    except Exception as error:
        return error, time.monotonic() - start_s
    return None, time.monotonic() - start_s


def unreadable(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def cursed(*_: Any) -> None:
    raise ArithmeticError("in one rank's step")


FAILING = {"loading": (runner, "Checkpoint"), "measuring": (runner.Runner, "forward")}


def fails_to_open(folder: Path, failing: int, at: str) -> Outcome:
    owner, name = FAILING[at]
    with replaced(owner, name, unreadable if dist.get_rank() == failing else getattr(owner, name)):
        error, seconds = timed(lambda: open_and_close(folder, {"overlap": "auto"}))
    dist.barrier()
    return Outcome(error and Raised(type(error), str(error)), seconds, None, generate_anew(folder))


def generate_anew(folder: Path) -> list[int]:
    with LLM(folder, **OPTIONS) as llm:
        return llm.generate(HELLO, GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize("failing", [0, 1])
def test_weights_that_one_rank_cannot_read(ranks, checkpoint, failing):
    outcomes = ranks(2).run(fails_to_open, checkpoint("llama"), failing, "loading", timeout_s=80)
    own, other = outcomes[failing], outcomes[1 - failing]
    assert own.raised == Raised(OSError, "[Errno 5] Input/output error")
    assert other.raised.kind is PeerError
    check_one_line(other.raised.text, rf"rank {failing} failed in loading the model: OSError: .*Input/output error")
    check_recovered(outcomes)


@pytest.mark.parametrize("failing", [0, 1])
def test_steps_that_one_rank_cannot_measure(ranks, checkpoint, failing):
    outcomes = ranks(2).run(fails_to_open, checkpoint("llama"), failing, "measuring", timeout_s=80)
    assert outcomes[failing].raised == Raised(OSError, "[Errno 5] Input/output error")
    check_lost(outcomes[1 - failing])
    check_recovered(outcomes)


def check_lost(outcome: Outcome) -> None:
    assert outcome.raised is not None, "nothing was raised"
    assert outcome.raised.kind is PeerError, outcome.raised
    check_one_line(outcome.raised.text, r"another rank was lost: its output says why; make a new LLM")


def check_recovered(outcomes: list[Outcome]) -> None:
    """In bounded time, far below the 60 s of the waits themselves; and a new LLM works."""
    for outcome in outcomes:
        assert outcome.seconds < 30
        assert outcome.generated == outcomes[0].generated


def fails_in_a_step(folder: Path, failing: int, at_call: int, overlap: str) -> Outcome:
    """The strand of rank `failing` raises in its `at_call`th attention; elsewhere nothing does."""
    attention, calls = decoder.Attention.__call__, []

    def strand(*arguments: Any) -> Any:
        calls.append(None)
        if dist.get_rank() == failing and len(calls) == at_call:
            cursed()
        return (yield from attention(*arguments))

    llm = LLM(folder, **OPTIONS | {"overlap": overlap})
    llm.generate(HELLO, GREEDY)
    lane = llm._runner.lane
    with replaced(decoder.Attention, "__call__", strand):
        error, seconds = timed(lambda: llm.generate([HELLO, HELLO[:2]], GREEDY))
    dist.barrier()
    assert not isinstance(lane, ThreadLane) or not lane._thread.is_alive(), "the lane did not drain"
    afterwards = raised_by(lambda: llm.generate(HELLO))
    return Outcome(error and Raised(type(error), str(error)), seconds, afterwards, generate_anew(folder))


@pytest.mark.parametrize("overlap", ["weave", "fused", "off"])
@pytest.mark.parametrize(("world_size", "failing", "at_call"), [(2, 0, 1), (2, 1, 4), (2, 1, 11), (4, 1, 2)])
def test_a_step_that_fails_on_one_rank(ranks, checkpoint, overlap, world_size, failing, at_call):
    """The others see its connections end. With four ranks in a ring, not all of them have one to it."""
    outcomes = ranks(world_size).run(fails_in_a_step, checkpoint("llama"), failing, at_call, overlap, timeout_s=100)
    for rank, outcome in enumerate(outcomes):
        if rank == failing:
            assert outcome.raised == Raised(ArithmeticError, "in one rank's step")
        else:
            check_lost(outcome)
        assert outcome.afterwards.kind is RuntimeError
        check_one_line(outcome.afterwards.text, r"this LLM cannot be used any more: an earlier call failed; make .*")
    check_recovered(outcomes)


def test_checkpoint_errors_are_value_errors():
    """So that callers need to know one kind."""
    assert issubclass(CheckpointError, ValueError)
