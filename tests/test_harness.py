"""The harness itself: ranks that raise, die or hang; checkpoints whose every parameter matters; the judge of text."""

import json
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import ARCHITECTURES, BOS, EOS, PAD, SMALL, VOCAB_SIZE, prompt_batch
from tests.ranks import RankError, RankFailure, RankPool
from tests.reference import (
    BOUND,
    NEAR_TIE,
    GreedyReport,
    greedy,
    judge_greedy,
    judge_rows,
    load_model,
    relative_error,
    relative_gaps,
    teacher_forced,
)

# -- ranks ------------------------------------------------------------------------------------------------------------


def weighted_sum(factor: float) -> float:
    total = torch.tensor(factor * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return total.item()


def environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names}


def tensor_of_rank(rows: int) -> torch.Tensor:
    return torch.full((rows, 2), float(dist.get_rank()))


def fail_on(rank: int, error: type[BaseException]) -> str:
    if dist.get_rank() == rank:
        raise error("on purpose")
    return "fine"


def raise_while_others_wait(rank: int) -> None:
    fail_on(rank, ValueError)
    dist.barrier()


def die(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os._exit(3)
    dist.barrier()


def hang_in_this_function() -> None:
    time.sleep(600)


def open_group_on(rank: int) -> None:
    """Leaves the ranks with different numbers of groups, as a rank does that raises between two dist.new_group."""
    if dist.get_rank() == rank:
        raise ValueError("before new_group")
    dist.distributed_c10d._world.group_count += 1


def speak(words: str) -> None:
    print(words, dist.get_rank())
    print("log", dist.get_rank(), file=sys.stderr)


def return_unpicklable() -> object:
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_group(ranks, world_size):
    assert ranks(world_size).run(weighted_sum, 2.0) == [world_size * (world_size + 1.0)] * world_size


def test_pool_is_reused(ranks):
    assert ranks(2).run(os.getpid) == ranks(2).run(os.getpid) == ranks(2).pids


def test_environment_is_that_of_torchrun(ranks):
    first, second = ranks(2).run(environment)
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "1", "1")
    assert first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["OMP_NUM_THREADS"] == "1"


def test_tensors_come_back(ranks):
    rows = 100_000  # 800 KB a rank: more than a pipe holds
    for rank, tensor in enumerate(ranks(2).run(tensor_of_rank, rows=rows)):
        assert torch.equal(tensor, torch.full((rows, 2), float(rank)))


def test_output_is_that_of_the_last_run(ranks):
    ranks(2).run(speak, "hello")
    assert ranks(2).output(1).split("\n") == ["hello 1", "log 1", ""]
    ranks(2).run(speak, "again")
    assert "hello" not in ranks(2).output(0)


def test_error_names_the_rank_and_the_others_are_not_waited_for(ranks):
    with pytest.raises(RankFailure, match=r"rank 1 raised ValueError: on purpose") as failure:
        ranks(2).run(raise_while_others_wait, 1)
    assert "in fail_on" in str(failure.value)  # the traceback
    assert "rank 0 had not answered" in str(failure.value)
    assert failure.value.errors[1].type is ValueError
    assert ranks(2).run(weighted_sum, 1.0) == [3.0, 3.0]


def test_unpicklable_result_is_an_error(ranks):
    with pytest.raises(RankFailure, match="rank 0 raised"):
        ranks(1).run(return_unpicklable)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_expected_errors_are_returned_and_keep_the_pool(ranks, error):
    pids = ranks(2).run(os.getpid)
    first, second = ranks(2).run(fail_on, 0, error, expect_errors=True)
    assert isinstance(first, RankError)
    assert (first.type, first.message, second) == (error, "on purpose", "fine")
    assert ranks(2).run(os.getpid) == pids


def test_ranks_that_no_longer_agree_are_ended(ranks, monkeypatch):
    monkeypatch.setattr("tests.ranks.CHECK_TIMEOUT_S", 2.0)  # they cannot meet however long they wait
    pids = ranks(2).run(os.getpid)
    ranks(2).run(open_group_on, 0, expect_errors=True)
    assert ranks(2).run(os.getpid) != pids
    assert ranks(2).run(weighted_sum, 1.0) == [3.0, 3.0]


def test_expected_errors_do_not_excuse_a_waiting_rank(ranks):
    with pytest.raises(RankFailure, match="no reply within 2 s"):
        ranks(2).run(raise_while_others_wait, 0, expect_errors=True, timeout_s=2)


def test_dead_rank_is_reported_and_replaced(ranks):
    with pytest.raises(RankFailure, match=r"rank 1 died with exit code 3[\s\S]*last words"):
        ranks(2).run(die, 1)
    assert ranks(2).run(weighted_sum, 1.0) == [3.0, 3.0]


def test_hang_ends_with_the_stacks(ranks):
    pids = ranks(1).run(os.getpid)
    with pytest.raises(RankFailure, match=r"no reply within 1 s[\s\S]*hang_in_this_function"):
        ranks(1).run(hang_in_this_function, timeout_s=1)
    assert not alive(pids[0])
    assert ranks(1).run(weighted_sum, 1.0) == [1.0]


def test_ranks_end_with_the_process_that_started_them():
    pool = RankPool(1)
    (pid,) = pool.run(os.getpid)
    pool._ranks[0].process.stdin.close()  # as when this process dies
    assert pool._ranks[0].process.wait(timeout=30) == 1
    assert not alive(pid)
    pool.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- checkpoints ------------------------------------------------------------------------------------------------------

SLICED = ("experts.gate_up_proj", "experts.down_proj")  # [expert, ...]: every expert has to matter
PROBE = prompt_batch(seed=9, lengths=[160])[0]


def parameters(model):
    """(name, tensor) of every parameter, those of experts one by one."""
    for name, parameter in model.named_parameters():
        if name.endswith(SLICED):
            yield from ((f"{name}[{expert}]", parameter[expert]) for expert in range(len(parameter)))
        else:
            yield name, parameter


def effects(model, probe: torch.Tensor):
    """(name, relative change of the logits when that parameter is disturbed by a tenth)."""
    before = model(probe).logits[0]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters(model):
        original = parameter.clone()
        parameter += 0.1 * original.std() * torch.randn(parameter.shape, generator=generator)
        yield name, relative_error(model(probe).logits[0], before).max().item()
        parameter.copy_(original)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_matters(checkpoint, name):
    model = load_model(checkpoint(name))
    with torch.inference_mode():
        changes = dict(effects(model, torch.tensor([PROBE])))
    assert len(changes) > 20
    assert {name: change for name, change in changes.items() if change < 10 * BOUND} == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_folder_is_the_drawn_model(checkpoint, name):
    """Config in either spelling, sharded or not: what AutoModelForCausalLM loads is what was asked for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint(name))
    for option, value in {**SMALL, **ARCHITECTURES[name].options}.items():
        found = getattr(config, option)
        assert (found.items() >= value.items()) if isinstance(value, dict) else (found == value), option


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokenizer_is_bytes(checkpoint, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    text = "12+34= é\n 数"
    assert tokenizer.encode(text, add_special_tokens=False) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<bos>[user] hi\n[assistant] "


def test_folders_vary_as_those_of_the_hub_do(checkpoint):
    assert (checkpoint("llama") / "model.safetensors.index.json").exists()
    assert (checkpoint("mistral") / "model.safetensors").exists()
    old = json.loads((checkpoint("llama_linear") / "config.json").read_text())
    assert old["rope_scaling"]["factor"] == 4.0
    assert "rope_parameters" not in old


def test_checkpoints_depend_on_the_seed_only(checkpoint, tmp_path):
    from tests.checkpoints import build_checkpoint

    probe = PROBE[:20]
    again = teacher_forced(build_checkpoint(tmp_path, "qwen2"), probe)
    assert torch.equal(teacher_forced(checkpoint("qwen2"), probe), again)
    assert not torch.equal(teacher_forced(checkpoint("qwen2", seed=1), probe), again)
    assert load_model(checkpoint("qwen2", dtype="bfloat16"), "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "sizes"), [("llama", [1, 2, 4, 8]), ("llama_six_heads", [1, 3, 6])])
def test_world_sizes_that_fit(name, sizes):
    assert [size for size in range(1, 9) if ARCHITECTURES[name].fits(size)] == sizes


# -- reference --------------------------------------------------------------------------------------------------------


def test_greedy_is_what_generate_gives(checkpoint):
    folder, prompt = checkpoint("qwen2_window"), prompt_batch(seed=3, lengths=[50])[0]
    model = load_model(folder)
    inputs = torch.tensor([prompt])
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=20, min_new_tokens=20
    )
    (text,) = greedy(folder, [prompt], 20)
    assert EOS not in text.tokens  # which min_new_tokens forbids generate to choose
    assert output[0, len(prompt) :].tolist() == text.tokens


def test_dynamic_rope_is_judged_as_it_is_decoded(checkpoint):
    folder, prompts = checkpoint("llama_dynamic"), prompt_batch(seed=0, lengths=[300, 240, 20])
    texts = greedy(folder, prompts, 40)
    judge_greedy(folder, prompts, [text.tokens for text in texts]).check()
    whole = teacher_forced(folder, prompts[1] + texts[1].tokens)
    decoded = teacher_forced(folder, prompts[1] + texts[1].tokens, prompt_length=240)
    assert relative_error(whole[:200], decoded[:200]).max() > 10 * BOUND  # one forward sees the longest length at once
    load_model.cache_clear()
    assert torch.equal(decoded[:240], teacher_forced(folder, prompts[1]))  # and no earlier text shows


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_greedy_text_is_lively_and_clear(checkpoint, seed):
    """Under 1 % near-ties over all architectures, and no text that stands still."""
    gaps, kinds = [], []
    for name in ARCHITECTURES:
        for text in greedy(checkpoint(name, seed), prompt_batch(seed, lengths=[1, 30]), 64):
            gaps += text.gaps
            kinds.append(len(set(text.tokens)))
    share = sum(gap < NEAR_TIE for gap in gaps) / len(gaps)
    assert share < 0.01
    assert sorted(kinds)[len(kinds) // 4] >= 16


def test_judge_accepts_the_reference_and_counts_near_ties(checkpoint):
    folder, prompts = checkpoint("olmo2"), prompt_batch(seed=1, lengths=[1, 40])
    texts = greedy(folder, prompts, 64)
    report = judge_greedy(folder, prompts, [text.tokens for text in texts])
    report.check()
    assert report.steps == 128
    assert report.excluded == sum(len(text.excluded()) for text in texts)


def test_judge_names_a_wrong_token(checkpoint):
    folder, prompts = checkpoint("olmo2"), prompt_batch(seed=1, lengths=[40])
    tokens = greedy(folder, prompts, 64)[0].tokens[:30]
    wrong = [*tokens[:7], (tokens[7] + 1) % VOCAB_SIZE, *tokens[8:]]
    report = judge_greedy(folder, prompts, [wrong])
    assert (report.wrong[0].step, report.wrong[0].expected) == (7, tokens[7])
    with pytest.raises(AssertionError, match="greedy tokens are wrong"):
        report.check()


def test_judge_leaves_near_ties_open():
    logits = torch.tensor([[0.0, 9.9999, 10.0], [0.0, 9.0, 10.0], [0.0, 10.0, 9.9999]])
    report = judge_rows(logits, [1, 1, 0], near_tie=1e-3)
    assert (report.steps, report.excluded, [token.step for token in report.wrong]) == (3, 2, [1, 2])
    assert (report + report).excluded_share == 2 / 3


def test_judging_nothing_is_not_a_pass():
    with pytest.raises(AssertionError, match="no greedy step"):
        GreedyReport().check()


def test_relative_error_is_per_row_and_sees_nan():
    reference = torch.tensor([[1.0, -4.0], [2.0, 1.0]])
    assert relative_error(reference + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), reference).tolist() == [0.25, 0.0]
    assert relative_error(torch.full((2, 2), float("nan")), reference).min() == float("inf")
    assert relative_gaps(reference).tolist() == [1.25, 0.5]
