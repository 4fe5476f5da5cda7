"""The overlapped loop against the plain one, on a real model: the same texts, whatever is asked and however it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import prompt_batch
from tokenweave import LLM, RequestOutput, SamplingParams
from tokenweave.comm.group import PeerError
from tokenweave.engine.kv_cache import BlockPool
from tokenweave.engine.prompts import Limits
from tokenweave.engine.scheduler import Scheduler

BLOCKS, BLOCK_SIZE, MODEL_LEN = 64, 4, 40
OPTIONS = {"num_kv_blocks": BLOCKS, "block_size": BLOCK_SIZE, "max_model_len": MODEL_LEN, "progress": False}


@pytest.fixture(scope="module")
def llm(checkpoint) -> Iterator[LLM]:
    with LLM(checkpoint("llama"), **OPTIONS) as llm:
        yield llm


@dataclass(frozen=True)
class Machine:
    """What a workload runs on."""

    blocks: int = BLOCKS
    budget: int = 64
    max_num_seqs: int = 8
    caching: bool = True


def made_new(llm: LLM, machine: Machine, overlapped: bool) -> BlockPool:
    """Make the engine of `llm` as good as new. Its cache starts as NaN: reading what nobody wrote shows."""
    pool = BlockPool(machine.blocks, BLOCK_SIZE, machine.caching)
    engine = llm._engine
    engine.scheduler = Scheduler(pool, machine.budget, machine.max_num_seqs)
    engine.limits = Limits(engine.limits.vocab_size, MODEL_LEN, BLOCK_SIZE * machine.blocks)
    engine.overlapped, engine.requests_seen = overlapped, 0
    llm._runner.storage.fill_(float("nan"))
    return pool


def generate(llm: LLM, machine: Machine, overlapped: bool, prompts: Any, params: Any) -> list[RequestOutput]:
    pool = made_new(llm, machine, overlapped)
    outputs = llm.generate(prompts, params)
    assert not llm._engine.scheduler.busy
    check_given_back(llm, pool)
    return outputs


def check_given_back(llm: LLM, pool: BlockPool) -> None:
    """All blocks of the cache, and each slot of the histories once."""
    slots = llm._engine.slots
    assert pool.num_free == pool.num_blocks
    assert sorted(slots.free) == list(range(slots.most))


def told(outputs: Sequence[RequestOutput]) -> list[Any]:
    """All that outputs say but their times."""
    return [
        (one.token_ids, one.text, one.finish_reason, one.stop_reason, logprobs_of(one))
        for output in outputs
        for one in output.outputs
    ]


def logprobs_of(one: Any) -> Any:
    """Steps are not composed alike, so sums are not rounded alike."""
    return one.logprobs and [
        {token_id: (pytest.approx(of.logprob, abs=1e-3), of.rank) for token_id, of in token.items()}
        for token in one.logprobs
    ]


def check_equal(llm: LLM, machine: Machine, prompts: Any, params: Any) -> list[RequestOutput]:
    """Both loops tell the same; returns what the overlapped one gave."""
    plain = generate(llm, machine, False, prompts, params)
    overlapped = generate(llm, machine, True, prompts, params)
    assert told(overlapped) == told(plain)
    return overlapped


# -- at random ---------------------------------------------------------------------------------------------------------


@st.composite
def asked(draw) -> SamplingParams:
    """Anything that a request may ask."""
    temperature = draw(st.sampled_from([0.0, 0.7, 1.2]))
    max_tokens = draw(st.integers(1, 12))
    characters = st.lists(st.characters(min_codepoint=32, max_codepoint=126), max_size=8, unique=True)
    return SamplingParams(
        temperature=temperature,
        n=draw(st.integers(1, 3)) if temperature else 1,
        max_tokens=draw(st.sampled_from([max_tokens, None])),
        min_tokens=draw(st.integers(0, max_tokens)) if max_tokens else 0,
        seed=draw(st.none() | st.integers(0, 3)),
        top_k=draw(st.sampled_from([0, 20])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.4])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.9])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.9])),
        stop=draw(characters),
        stop_token_ids=draw(st.lists(st.integers(0, 258), max_size=20)),
        include_stop_str_in_output=draw(st.booleans()),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.none() | st.integers(0, 3)),
    )


@st.composite
def workloads(draw) -> tuple[Machine, list[list[int]], list[SamplingParams]]:
    """Prompts that partly begin alike, on caches down to the least in which each prompt alone still fits."""
    beginning = draw(st.lists(st.integers(0, 255), min_size=9, max_size=9))
    tails = draw(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=1, max_size=5))
    prompts = [beginning * draw(st.booleans()) + tail for tail in tails]
    params = [draw(asked()) for _ in prompts]
    longest = max(
        min(len(prompt) + (one.max_tokens or MODEL_LEN), MODEL_LEN) for prompt, one in zip(prompts, params, strict=True)
    )
    machine = Machine(
        blocks=-(-longest // BLOCK_SIZE) + draw(st.integers(0, 6)),
        budget=draw(st.integers(1, 40)),
        max_num_seqs=draw(st.integers(1, 5)),
        caching=draw(st.booleans()),
    )
    return machine, prompts, params


@given(workload=workloads())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_workload(llm, workload):
    check_equal(llm, *workload)


# -- one by one --------------------------------------------------------------------------------------------------------

PROMPTS = prompt_batch(11, (3, 14, 1, 9))
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def first_tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in generate(llm, Machine(), False, PROMPTS, GREEDY)]


def launched(llm: LLM, monkeypatch) -> list[Any]:
    """The batches that run from now on."""
    batches, forward = [], llm._runner.forward
    monkeypatch.setattr(llm._runner, "forward", lambda *step: batches.append(step[0]) or forward(*step))
    return batches


def test_every_step_but_the_first_is_launched_before_the_tokens_of_the_last_are_known(llm, monkeypatch):
    batches = launched(llm, monkeypatch)
    generate(llm, Machine(), True, PROMPTS, GREEDY)
    assert [batch.late for batch in batches] == [()] + [((0, 0), (1, 1), (2, 2), (3, 3))] * 9
    assert [batch.rows for batch in batches] == [3 + 14 + 1 + 9] + [4] * 9  # and none for the end, known beforehand


def test_a_text_that_ends_unforeseen_is_computed_one_token_too_far(llm, monkeypatch):
    end = first_tokens(llm)[0][4]
    batches = launched(llm, monkeypatch)
    (output,) = check_equal(
        llm, Machine(), PROMPTS[:1], SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[end])
    )
    assert len(output.outputs[0].token_ids) == 5
    assert len(batches) == 5 + 6


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_in_flight(llm, caching):
    """The cache holds one of them to its end, and the beginnings of all."""
    outputs = check_equal(
        llm,
        Machine(blocks=11, caching=caching),
        PROMPTS,
        SamplingParams(temperature=1, seed=3, max_tokens=20, repetition_penalty=1.2, ignore_eos=True),
    )
    assert sum(output.metrics.preemptions for output in outputs) > 0


def test_a_prefix_that_was_generated_is_found_again(llm):
    """Only full blocks of known tokens: when a text's last step is launched, its last token but one is late."""
    cached = {}
    for overlapped in (False, True):
        made_new(llm, Machine(), overlapped)
        (first,) = llm.generate(PROMPTS[:1], GREEDY)
        text = [*PROMPTS[0], *first.outputs[0].token_ids]
        (second,) = llm.generate([text], GREEDY)
        cached[overlapped] = second.metrics.cached_tokens
        assert told([second]) == told(generate(llm, Machine(caching=False), False, [text], GREEDY))
    assert len(text) == 13
    assert cached == {False: 12, True: 8}


def test_a_stream_tells_every_token_once_and_in_order(llm):
    params = [SamplingParams(temperature=0.8, n=2, max_tokens=7, seed=5), GREEDY]
    made_new(llm, Machine(), True)
    parts: dict[str, list[RequestOutput]] = {}
    for part in llm.generate(PROMPTS[:2], params, stream=True):
        parts.setdefault(part.request_id, []).append(part)
    final = [each[-1] for each in parts.values()]
    assert told(final) == told(generate(llm, Machine(), False, PROMPTS[:2], params))
    for each in parts.values():
        assert [part.finished for part in each] == [False] * (len(each) - 1) + [True]
        counts = [[len(one.token_ids) for one in part.outputs] for part in each]
        assert all(sum(after) > sum(before) for before, after in itertools.pairwise(counts))


def both_loops(folder: Path, overlap: str) -> list[Any]:
    """Runs on every rank: what each loop tells, of texts that end unforeseen, are preempted, or need a late token."""
    params = [
        SamplingParams(temperature=0, max_tokens=15, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(temperature=0.9, n=2, seed=1, max_tokens=12, stop=list("abcdefgh")),
        SamplingParams(temperature=1, seed=2, max_tokens=15, min_tokens=4, stop_token_ids=[*range(0, 256, 5)]),
        SamplingParams(temperature=1, seed=3, max_tokens=20, frequency_penalty=1.0, ignore_eos=True),
    ]
    told_by = []
    for overlapped in (False, True):
        options = OPTIONS | {"num_kv_blocks": 11, "overlap": overlap, "async_scheduling": overlapped}
        with LLM(folder, **options, max_num_batched_tokens=12, timeout_s=60) as llm:
            told_by.append(told(llm.generate(PROMPTS, params)))
    return told_by


@pytest.mark.parametrize("overlap", ["off", "weave"])
def test_on_two_ranks(ranks, checkpoint, overlap):
    """The others hear of late tokens by their places alone, and find them on their own devices."""
    (plain, overlapped), others = ranks(2).run(both_loops, checkpoint("llama"), overlap)
    assert overlapped == plain
    assert others == [plain, overlapped]
    assert plain == both_loops(checkpoint("llama"), "off")[0]


def give_up(folder: Path, overlapped: bool) -> str:
    """Runs on every rank: from the third step on, each finds that a sum gave up on the other."""
    with LLM(folder, **OPTIONS, async_scheduling=overlapped, timeout_s=20) as llm:
        rank, steps, forward = dist.get_rank(), [], llm._runner.forward

        def check() -> None:
            if len(steps) > 2:
                raise PeerError(f"rank {rank}, half 0: rank {1 - rank} did not arrive")

        llm._runner.forward = lambda *step: steps.append(step) or forward(*step)
        llm._runner.communicator.check = check
        with pytest.raises(PeerError) as caught:
            llm.generate(PROMPTS, GREEDY)
        return str(caught.value)


@pytest.mark.parametrize("overlapped", [False, True])
def test_every_rank_tells_what_its_own_sums_report(ranks, checkpoint, overlapped):
    """Though rank 0 alone waits, and leaves."""
    said = ranks(2).run(give_up, checkpoint("llama"), overlapped)
    assert said == [f"rank {rank}, half 0: rank {1 - rank} did not arrive" for rank in (0, 1)]


def test_a_stream_that_is_broken_off_leaves_nothing_behind(llm):
    """Some texts have ended by then, and two that have not keep their tokens for penalties."""
    penalised = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, repetition_penalty=1.3)
    short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, presence_penalty=1.0)
    pool = made_new(llm, Machine(), True)
    stream = llm.generate(PROMPTS, [GREEDY, penalised, short, penalised], stream=True)
    next(part for part in stream if len(part.outputs[0].token_ids) == 3)
    stream.close()
    check_given_back(llm, pool)
    expected = first_tokens(llm)
    pool = made_new(llm, Machine(), True)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    check_given_back(llm, pool)
