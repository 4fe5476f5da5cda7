"""The public API: what a call takes and gives back, streams, chat, closing; on one rank and on two.

What must hold in a world of any size is a function of an open LLM, which the fixture `use` runs on every rank.
"""

import gc
import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import BOS, CHAT_TEMPLATE, prompt_batch
from tokenweave import LLM, RequestOutput, SamplingParams
from tokenweave.comm.link import Link, PacedTransport
from tokenweave.comm.transport import CollectiveTransport
from tokenweave.engine import runner

OPTIONS: dict[str, Any] = {"overlap": "weave", "num_kv_blocks": 64, "block_size": 4, "progress": False}
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1, n=2, max_tokens=7, logprobs=2, ignore_eos=True)
PROMPTS = prompt_batch(seed=5, lengths=(1, 6, 13))
HELLO = list(b"hello")

Use = Callable[..., list[Any]]


def with_llm(folder: Path, function: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
    with LLM(folder, **OPTIONS | options) as llm:
        return function(llm, *args)


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def use(request, ranks, checkpoint) -> Use:
    """use(function, *args, **options): its result with a new LLM, of every rank."""
    folder = checkpoint("llama")

    def on_every_rank(function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        if request.param == 1:
            return [with_llm(folder, function, args, options)]
        return ranks(request.param).run(with_llm, folder, function, args, options)

    return on_every_rank


def same(results: list[Any]) -> Any:
    """The result that all ranks have."""
    assert all(result == results[0] for result in results)
    return results[0]


def told(outputs: list[RequestOutput]) -> list[Any]:
    """What outputs say of the text: all but the request's number and its times."""
    return [(one.prompt, one.prompt_token_ids, one.outputs, one.finished) for one in outputs]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [one.outputs[0].token_ids for one in outputs]


# -- what a call takes ------------------------------------------------------------------------------------------------


def every_form(llm: LLM) -> list[list[RequestOutput]]:
    forms = ["hello", ["hello"], HELLO, [HELLO], ("hello",), ["hello", HELLO], ["hello", "hello", "hello"]]
    return [llm.generate(form, GREEDY) for form in forms]


def test_prompts_of_every_form(use):
    results = same(use(every_form))
    assert [len(outputs) for outputs in results] == [1, 1, 1, 1, 1, 2, 3]
    assert all(output.prompt_token_ids == HELLO for outputs in results for output in outputs)
    assert len({tuple(ids) for outputs in results for ids in tokens(outputs)}) == 1
    assert [output.prompt for output in results[5]] == ["hello", None]


def params_of_every_form(llm: LLM) -> list[list[RequestOutput]]:
    each = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (2, 5, 3)]
    return [llm.generate(PROMPTS, params) for params in (GREEDY, [GREEDY] * 3, each, None)]


def test_one_params_or_one_for_each_prompt(use):
    one, repeated, each, default = same(use(params_of_every_form))
    assert told(one) == told(repeated)
    assert tokens(each) == [ids[:count] for ids, count in zip(tokens(one), (2, 5, 3), strict=True)]
    assert all(1 <= len(ids) <= SamplingParams().max_tokens for ids in tokens(default))


def stopped(llm: LLM, token_id: int) -> list[RequestOutput]:
    return llm.generate("hello", SamplingParams(temperature=0, max_tokens=9, stop_token_ids=[token_id]))


def test_outputs_say_what_happened(use, checkpoint):
    (output,) = same(use(LLM.generate, "hello", GREEDY))
    (text,) = output.outputs
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("hello", HELLO, True)
    assert (text.index, text.finish_reason, text.stop_reason) == (0, "length", None)
    assert (text.logprobs, text.cumulative_logprob) == (None, None)
    assert len(text.token_ids) == 9
    assert text.text == bytes(one for one in text.token_ids if one < BOS).decode(errors="replace")
    metrics = output.metrics
    assert metrics.arrival_s <= metrics.first_scheduled_s <= metrics.first_token_s <= metrics.finished_s
    end = next(i for i, one in enumerate(text.token_ids) if i > 1 and one not in text.token_ids[:i])
    ((short,),) = [one.outputs for one in same(use(stopped, text.token_ids[end]))]
    assert (short.token_ids, short.finish_reason, short.stop_reason) == (
        text.token_ids[: end + 1],
        "stop",
        text.token_ids[end],
    )


def test_completions_and_logprobs(use):
    for output in same(use(LLM.generate, PROMPTS, SAMPLED)):
        assert [text.index for text in output.outputs] == [0, 1]
        assert output.outputs[0].token_ids != output.outputs[1].token_ids
        for text in output.outputs:
            chosen = [step[one].logprob for one, step in zip(text.token_ids, text.logprobs, strict=True)]
            assert all(2 <= len(step) <= 3 for step in text.logprobs)
            assert text.cumulative_logprob == pytest.approx(sum(chosen))


def greedy_and_sampled(llm: LLM) -> list[Any]:
    seeded = SamplingParams(temperature=1, top_p=0.9, seed=11, max_tokens=20, ignore_eos=True)
    return [tokens(llm.generate(PROMPTS, params)) for params in (GREEDY, SAMPLED, seeded)]


def test_worlds_of_every_size_generate_the_same(ranks, checkpoint):
    folder = checkpoint("llama")
    alone = with_llm(folder, greedy_and_sampled, (), {})
    for world_size in (2, 4):
        assert same(ranks(world_size).run(with_llm, folder, greedy_and_sampled, (), {})) == alone


def with_transport(folder: Path, name: str) -> list[Any]:
    original = runner.open_transport
    runner.open_transport = lambda config, ranks: TRANSPORTS[name](original(config, ranks), ranks)
    try:
        return [with_llm(folder, greedy_and_sampled, (), {"overlap": overlap}) for overlap in ("weave", "fused", "off")]
    finally:
        runner.open_transport = original


TRANSPORTS: dict[str, Callable[..., Any]] = {
    "paced": lambda transport, ranks: PacedTransport(transport, Link(bandwidth_bytes_per_s=1e7, latency_s=1e-4)),
    "collective": lambda transport, ranks: CollectiveTransport(ranks.rank, ranks.world_size, ranks.comm),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_transport_changes_the_text(ranks, checkpoint, transport):
    """A paced one, and the one that is NCCL's, here over gloo."""
    folder = checkpoint("llama")
    expected = with_llm(folder, greedy_and_sampled, (), {})
    assert same(ranks(2).run(with_transport, folder, transport)) == [expected] * 3


def sampled_twice(llm: LLM) -> list[Any]:
    seeded = SamplingParams(temperature=1, seed=7, max_tokens=7, ignore_eos=True)
    unseeded = SamplingParams(temperature=1, max_tokens=7, ignore_eos=True)
    return [tokens(llm.generate(HELLO, params)) for params in (seeded, unseeded, seeded, unseeded)]


def test_seeds(use):
    first, second = same(use(sampled_twice)), same(use(sampled_twice))
    other = same(use(sampled_twice, seed=1))
    assert first == second  # the LLM's seed starts anew with each LLM
    assert first[0] == first[2] == other[0]  # a request's own seed is all that counts
    assert first[1] != first[3]  # without one, each request draws anew
    assert first[1] != other[1]


def test_requests_that_must_wait_and_be_preempted(use):
    prompts = prompt_batch(seed=6, lengths=[20] * 9)
    ample = same(use(LLM.generate, prompts, GREEDY))
    tight = same(use(LLM.generate, prompts, GREEDY, num_kv_blocks=8, max_num_seqs=3, max_num_batched_tokens=7))
    assert tokens(ample) == tokens(tight)


# -- chat -------------------------------------------------------------------------------------------------------------

ASK = [{"role": "user", "content": "hi"}]
TOLD = [{"role": "system", "content": "be brief"}, *ASK]


def chats(llm: LLM) -> list[Any]:
    streamed = list(llm.chat(ASK, GREEDY, stream=True))
    return [
        llm.chat(ASK, GREEDY),
        llm.chat([ASK, TOLD], GREEDY),
        llm.chat(ASK, GREEDY, add_generation_prompt=False),
        streamed[-1:],
    ]


def test_chat_applies_the_template(use):
    one, two, bare, streamed = same(use(chats))
    assert "{{ bos_token }}" in CHAT_TEMPLATE
    asked = [BOS, *b"[user] hi\n[assistant] "]
    assert [output.prompt_token_ids for output in one] == [asked]
    told_ids = [BOS, *b"[system] be brief\n[user] hi\n[assistant] "]
    assert [output.prompt_token_ids for output in two] == [asked, told_ids]
    assert [output.prompt_token_ids for output in bare] == [[BOS, *b"[user] hi\n"]]
    assert told(streamed) == told(one)
    assert tokens(two)[0] == tokens(one)[0]


# -- streams ----------------------------------------------------------------------------------------------------------


def streamed_and_plain(llm: LLM, params: Any) -> tuple[list[RequestOutput], list[RequestOutput]]:
    return list(llm.generate(PROMPTS, params, stream=True)), llm.generate(PROMPTS, params)


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=1, n=2, seed=3, max_tokens=7, logprobs=1),
        [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (1, 9, 4)],
    ],
    ids=["greedy", "sampled", "of different lengths"],
)
def test_a_stream_grows_to_the_plain_output(use, params):
    streamed, plain = same(use(streamed_and_plain, params, enable_prefix_caching=False))  # both do the same sums
    for number, final in enumerate(plain):
        parts = [part for part in streamed if part.prompt_token_ids == PROMPTS[number]]
        assert told(parts[-1:]) == told([final])
        assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
        assert len(parts) == max(len(text.token_ids) for text in final.outputs)
        for shorter, longer in itertools.pairwise(parts):
            for before, after in zip(shorter.outputs, longer.outputs, strict=True):
                assert after.text.startswith(before.text)
                assert after.token_ids[: len(before.token_ids)] == before.token_ids
            assert shorter.outputs != longer.outputs


def test_a_stream_comes_step_by_step(checkpoint):
    """The first part is there when one step has run, not when all have."""
    with LLM(checkpoint("llama"), **OPTIONS) as llm:
        steps, forward = [], llm._runner.forward
        llm._runner.forward = lambda *step: steps.append(step) or forward(*step)
        stream = llm.generate(HELLO, GREEDY, stream=True)
        assert len(steps) == 0
        for count, part in enumerate(stream, start=1):
            assert (len(steps), len(part.outputs[0].token_ids)) == (count, count)
        assert count == 9


def never_iterated(stream: Iterator[RequestOutput]) -> None:
    pass


def broken_off(stream: Iterator[RequestOutput]) -> None:
    for _ in stream:
        break


def deleted_later(stream: Iterator[RequestOutput]) -> None:
    for _ in range(5):
        next(stream)
    del stream


def closed(stream: Iterator[RequestOutput]) -> None:
    next(stream)
    stream.close()


def raise_at_the_first_part(stream: Iterator[RequestOutput]) -> None:
    for part in stream:
        raise KeyError(part)


def left_by_an_error(stream: Iterator[RequestOutput]) -> None:
    with pytest.raises(KeyError):
        raise_at_the_first_part(stream)


def read_to_the_end(stream: Iterator[RequestOutput]) -> None:
    assert len(list(stream)) == 3 * 9


def read_to_the_last_part(stream: Iterator[RequestOutput]) -> None:
    """All that there is, but not so far that the iterator has said so."""
    for _ in range(3 * 9):
        next(stream)


WAYS_TO_LEAVE = (
    never_iterated,
    broken_off,
    deleted_later,
    closed,
    left_by_an_error,
    read_to_the_end,
    read_to_the_last_part,
)


def left_in_every_way(llm: LLM) -> list[list[list[int]]]:
    """The tokens of a plain call before, and after each way to leave a stream."""
    calls = [tokens(llm.generate(PROMPTS, GREEDY))]
    for leave in WAYS_TO_LEAVE:
        leave(llm.generate(PROMPTS, GREEDY, stream=True))
        calls.append(tokens(llm.generate(PROMPTS, GREEDY)))
        check_idle(llm)
    return calls


def check_idle(llm: LLM) -> None:
    """Nothing is left of earlier calls: every block is free."""
    scheduler = llm._engine.scheduler
    assert not scheduler.busy
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_a_new_call_works_however_a_stream_was_left(use):
    calls = same(use(left_in_every_way))
    assert all(call == calls[0] for call in calls)


def kept_streams(llm: LLM) -> Any:
    """Streams that are kept while others begin, and one in whose loop plain calls are made."""
    first = llm.generate(PROMPTS, GREEDY, stream=True)
    next(first)
    second = llm.generate(PROMPTS, GREEDY, stream=True)
    parts = [next(second) for _ in range(4)]
    plain = tokens(llm.generate(HELLO, GREEDY))
    ended = list(first), list(second)
    inner = [tokens(llm.generate(HELLO, GREEDY)) for _ in llm.generate(PROMPTS, GREEDY, stream=True)]
    return ended, [part.prompt_token_ids for part in parts], plain, inner


def test_a_new_call_ends_the_streams_before_it(use):
    ended, parts, plain, inner = same(use(kept_streams))
    assert [len(left) for left in ended] == [2, 2]  # the step that had run gave one part to each of three requests
    assert parts == [PROMPTS[i] for i in (0, 1, 2, 0)]
    assert inner == [plain] * 3


def left_at_different_points(llm: LLM) -> list[list[list[int]]]:
    """Each rank leaves its stream elsewhere: rank 0's word counts, the others come along."""
    rank, calls = dist.get_rank(), []
    for counts in ((0, 5), (5, 0), (2, 27), (27, 2), (1, None), (None, 1)):
        stream = llm.generate(PROMPTS, GREEDY, stream=True)
        list(itertools.islice(stream, counts[rank]))
        calls.append(tokens(llm.generate(PROMPTS, GREEDY)))
    return calls


def test_ranks_may_leave_a_stream_at_different_points(ranks, checkpoint):
    calls = same(ranks(2).run(with_llm, checkpoint("llama"), left_at_different_points, (), {}))
    assert all(call == calls[0] for call in calls)


# -- ranks ------------------------------------------------------------------------------------------------------------


def other_arguments_elsewhere(llm: LLM) -> Any:
    junk = [
        (HELLO, GREEDY),
        ([], None),
        (None, 3),
        ([[10**9]], SamplingParams(n=4)),
        ("x" * 10**5, [GREEDY, GREEDY]),
    ]
    calls = [told(llm.generate(*(one if dist.get_rank() else (HELLO, GREEDY)))) for one in junk]
    chat = told(llm.chat(None if dist.get_rank() else ASK, GREEDY))
    return calls, chat, told(llm.generate(HELLO, GREEDY))


def test_rank_0_alone_says_what_is_generated(ranks, checkpoint):
    calls, _, after = same(ranks(2).run(with_llm, checkpoint("llama"), other_arguments_elsewhere, (), {}))
    assert all(call == after for call in calls)


def one_after_another(folder: Path) -> list[Any]:
    """LLMs one after another with one open throughout, all used in turn: under torchrun each has groups of its own."""
    results, threads = [], {thread.name for thread in threading.enumerate()}
    with LLM(folder, **OPTIONS) as throughout:
        for overlap in ("weave", "off", "fused", "auto"):
            llm = LLM(folder, **OPTIONS | {"overlap": overlap})
            results.append(tokens(llm.generate(PROMPTS, GREEDY)))
            results.append(tokens(throughout.generate(PROMPTS, GREEDY)))
            llm.close()
    assert {thread.name for thread in threading.enumerate()} - threads <= {"tqdm_monitor"}
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_several_in_one_process(ranks, checkpoint, world_size):
    folder = checkpoint("llama")
    results = [one_after_another(folder)] if world_size == 1 else ranks(world_size).run(one_after_another, folder)
    assert all(one == same(results)[0] for one in results[0])


# -- closing ----------------------------------------------------------------------------------------------------------


def test_closing_frees_all(checkpoint):
    llm = LLM(checkpoint("llama"), **OPTIONS)
    stream = llm.generate(PROMPTS, GREEDY, stream=True)
    next(stream)
    held = [weakref.ref(one) for one in (llm._runner.model, llm._runner.storage, llm._runner.lane, llm._engine)]
    llm.close()
    gc.collect()
    assert [one() for one in held] == [None] * len(held)
    assert "tokenweave-comm-lane" not in {thread.name for thread in threading.enumerate()}
    assert len(list(stream)) == len(PROMPTS) - 1  # what the one step gave that had run


def test_closed_is_closed(checkpoint):
    with LLM(checkpoint("llama"), **OPTIONS) as llm:
        llm.generate(HELLO, GREEDY)
    for _ in range(2):
        llm.close()
        for call in (lambda: llm.generate(HELLO), lambda: llm.generate(HELLO, stream=True), lambda: llm.chat(ASK)):
            with pytest.raises(
                RuntimeError, match=r"^this LLM cannot be used any more: it was closed; make a new one$"
            ):
                call()


def test_an_error_in_the_block_closes_and_goes_up(checkpoint):
    with pytest.raises(KeyError), LLM(checkpoint("llama"), **OPTIONS) as llm:
        raise_at_the_first_part(llm.generate(PROMPTS, GREEDY, stream=True))
    with pytest.raises(RuntimeError, match="it was closed"):
        llm.generate(HELLO)


def test_closed_in_its_own_loop(checkpoint):
    llm = LLM(checkpoint("llama"), **OPTIONS)
    parts = []
    for part in llm.generate(PROMPTS, GREEDY, stream=True):
        parts.append(part)
        llm.close()
    assert len(parts) == len(PROMPTS)


def failing_forward(llm: LLM) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("in a step")

    llm._runner.forward = fail


def test_a_failed_call_closes_and_keeps_nothing_alive(checkpoint):
    """Even while the caller keeps the error, with the frames of its traceback, as an interactive session does."""
    llm = LLM(checkpoint("llama"), **OPTIONS)
    held = [weakref.ref(llm._runner.model), weakref.ref(llm._runner.storage)]
    failing_forward(llm)
    with pytest.raises(ArithmeticError, match="in a step") as caught:
        llm.generate(HELLO)
    with pytest.raises(
        RuntimeError, match=r"^this LLM cannot be used any more: an earlier call failed; make a new one$"
    ):
        llm.generate(HELLO)
    gc.collect()
    assert [one() for one in held] == [None, None]
    assert caught.value is not None


def test_threads_are_as_before(checkpoint):
    before = torch.get_num_threads()
    LLM(checkpoint("llama"), **OPTIONS).close()
    assert torch.get_num_threads() == before


# -- memory -----------------------------------------------------------------------------------------------------------


def private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def memory_of_opening(folder: Path, small_folder: Path) -> tuple[int, int, int]:
    """(bytes of this rank's weights, most private memory while opening, private memory when open), beyond before."""
    LLM(small_folder, **OPTIONS).close()  # all code is loaded by then
    before, peak, done = private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], private_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with LLM(folder, **OPTIONS | {"num_kv_blocks": 1, "max_model_len": 8, "max_num_batched_tokens": 8}) as llm:
        done.set()
        watcher.join()
        weights = sum(wanted.into.nbytes for wanted in llm._runner.model.loads())
        return weights, peak[0] - before, private_bytes() - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_rank_takes_the_memory_of_its_share(ranks, checkpoint, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    whole = 2 * sum(parameter.nbytes for parameter in model.parameters())  # fp32 on a CPU
    for weights, peak, kept in ranks(2).run(memory_of_opening, tmp_path, checkpoint("llama")):
        assert weights == pytest.approx(whole / 2, rel=0.01)
        print(f"whole {whole / 1e6:.0f} MB, share {weights / 1e6:.0f}, peak {peak / 1e6:.0f}, kept {kept / 1e6:.0f}")
        assert peak < weights + 0.15 * whole
        assert kept < weights + 0.1 * whole
