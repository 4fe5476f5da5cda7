import math
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tokenweave.engine import penalties
from tokenweave.engine.drawing import drawing_arrays
from tokenweave.engine.histories import Histories, history_arrays
from tokenweave.engine.penalties import penalise, penalty_arrays
from tokenweave.engine.random import request_key
from tokenweave.engine.sampler import GREEDY, History, SamplingRow, sample, sampling_row, told_by
from tokenweave.engine.truncation import truncate
from tokenweave.engine.upload import upload
from tokenweave.sampling_params import SamplingParams

FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.8, "top_k": 1},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.3, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.7, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 9, "top_p": 0.8},
    {"temperature": 1.1, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


def normal(rows: int, vocabulary: int, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def reference_scores(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """What transformers makes of logits [R, V] under the filters of one row: -inf where a token cannot be drawn."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(row.temperature)])
    if row.top_k > 0:
        warpers.append(TopKLogitsWarper(row.top_k))
    if row.top_p < 1:
        warpers.append(TopPLogitsWarper(row.top_p))
    if row.min_p > 0:
        warpers.append(MinPLogitsWarper(row.min_p))
    return warpers(torch.zeros(logits.shape[0], 1, dtype=torch.long), logits.double())


def kept(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    """bool [R, V]: the tokens that the sampler may draw."""
    on = upload(drawing_arrays(rows, logits.shape[1]), logits.device)
    scores = (logits - logits.amax(-1, keepdim=True)) * on["floats"][:, :1]
    truncate(scores, rows, on["integers"][:, 2], on["floats"][:, 1], on["floats"][:, 2])
    return scores.isfinite()


def said(*output: int, prompt: tuple[int, ...] = (), late: int | None = None) -> History:
    """All that there is to say of prompt and output."""
    return History(0, 0, (*prompt, *output), late, len(prompt))


def alone(rows: list[SamplingRow]) -> list[SamplingRow]:
    """Each with a slot of its own."""
    return [replace(row, history=row.history and replace(row.history, slot=i)) for i, row in enumerate(rows)]


def penalised(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    """Scores of the rows, each with all its history."""
    scores, histories, told = logits.clone(), Histories(logits.device), told_by(alone(rows))
    on = upload(penalty_arrays(rows) | history_arrays(told), logits.device)
    histories.take_in(told, on, None)
    penalise(scores, histories, on["histories"], on["penalties"], max(one.length for one in told))
    return scores


def mixed_rows() -> list[SamplingRow]:
    """Rows of every kind: greedy, filtered, penalised, suppressed, with log-probabilities."""
    rows = [SamplingRow(key=request_key(0, i, 0), position=10 + i, **kwargs) for i, kwargs in enumerate(FILTERS)]
    history = said(4, 4, 5, prompt=(1, 2, 2, 3))
    rows += [replace(row, repetition_penalty=1.3, frequency_penalty=0.5, history=history) for row in rows[:6]]
    rows += [GREEDY, GREEDY, SamplingRow(logprobs=3), SamplingRow(suppressed_token_ids=(0, 7))]
    rows += [SamplingRow(presence_penalty=1.0, history=said(8, 9, 9)), replace(rows[3], logprobs=5)]
    return alone(rows)


# --- greedy ----------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Uploads(TorchDispatchMode):
    """Counts what goes from the CPU to another device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" != result.device.type
        return result


def test_a_greedy_batch_is_one_argmax_and_nothing_else():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    with Operators() as operators:
        sampled = sample(logits, [GREEDY, SamplingRow()])
    assert operators.names == ["aten.argmax.default"]
    assert sampled.token_ids.tolist() == [1, 0]
    assert sampled.reports is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_equals(dtype):
    logits = torch.zeros(2, 1000, dtype=dtype)
    logits[0, [17, 400]] = 1
    assert sample(logits, [GREEDY, GREEDY]).token_ids.tolist() == [17, 0]


def test_no_rows():
    sampled = sample(torch.zeros(0, 5), [])
    assert sampled.token_ids.tolist() == []
    assert sampled.read() == []


@pytest.mark.parametrize("shape", [(3, 5), (5,)])
def test_rows_must_match(shape):
    with pytest.raises(ValueError, match=r"expected \[2, vocabulary\]; pass one row per sample"):
        sample(torch.zeros(shape), [GREEDY, GREEDY])


# --- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", FILTERS, ids=str)
@pytest.mark.parametrize("counter", ["position", "key"])
def test_frequencies_are_those_of_transformers(kwargs, counter):
    """Chi-squared over the tokens that should turn up often enough, at six sigma; no draw outside of the kept set."""
    logits, draws = normal(1, 40), 10_000
    counters = range(draws) if counter == "position" else [request_key(1, i, 0) for i in range(draws)]
    base = SamplingRow(key=request_key(5, 0, 0), position=3, **kwargs)
    rows = [replace(base, **{counter: value}) for value in counters]
    drawn = torch.bincount(sample(logits.expand(draws, -1), rows).token_ids, minlength=40).double()
    expected = reference_scores(logits, base)[0].softmax(-1) * draws
    assert (drawn[expected == 0] == 0).all()
    often = expected >= 10
    assert (drawn[often] > 0).all()
    statistic, freedom = ((drawn - expected)[often] ** 2 / expected[often]).sum().item(), int(often.sum()) - 1
    assert abs(statistic - freedom) <= 6 * math.sqrt(2 * max(freedom, 1))


@pytest.mark.parametrize("vocabulary", [7, 1500, 5000])
@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0], ids=lambda scale: f"scale{scale}")
def test_the_kept_set_is_that_of_transformers(vocabulary, scale):
    """Different filters side by side; nuclei both smaller and larger than the guess."""
    logits = normal(len(FILTERS), vocabulary, seed=3, scale=scale)
    rows = [SamplingRow(**kwargs) for kwargs in FILTERS]
    for mask, row, row_logits in zip(kept(logits, rows), rows, logits, strict=True):
        assert torch.equal(mask, reference_scores(row_logits[None], row)[0].isfinite()), row


def test_nothing_is_sorted():
    """A vocabulary is too large for it."""
    with Operators() as operators:
        sample(normal(len(FILTERS), 5000), [SamplingRow(**kwargs) for kwargs in FILTERS])
    assert not {"aten.topk.default", "aten.sort.default"} & set(operators.names)


def test_what_a_step_uploads_goes_in_one_copy():
    """Rows of every kind; filters are in a kernel where there is anything to upload."""
    rows = [replace(row, top_k=0, top_p=1.0) for row in mixed_rows()]
    with Uploads() as uploads:
        sample(torch.empty(len(rows), 100, device="meta"), rows)
    assert uploads.count == 1


def test_tokens_that_tie_with_the_last_kept_are_kept_in_any_batch():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    row, wide = SamplingRow(temperature=1, top_k=2), SamplingRow(temperature=1, top_p=0.999)
    assert kept(logits, [row]).tolist() == [[True, True, True, True, False]]
    assert kept(logits.expand(2, -1), [row, wide])[0].tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.55, 1), (0.6, 11)])
def test_of_tokens_that_tie_top_p_counts_as_many_as_top_k_has_room_for(top_p, count):
    """Of three tokens the first has 1 / (1 + 2 / e) = 0.58 of the mass; nine more tie with the third."""
    logits = torch.tensor([[0.0] + [-1.0] * 10])
    assert kept(logits, [SamplingRow(temperature=1, top_k=3, top_p=top_p)]).sum() == count


@pytest.mark.parametrize("temperature", [1e-5, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = 1000 * normal(50, 300)
    rows = [SamplingRow(temperature=temperature, key=i, position=i, top_p=0.9) for i in range(50)]
    assert torch.equal(sample(logits, rows).token_ids, logits.argmax(-1))


def test_a_huge_temperature_is_uniform():
    logits = 1000 * normal(1, 10)
    rows = [SamplingRow(temperature=1e30, position=i) for i in range(5000)]
    counts = torch.bincount(sample(logits.expand(5000, -1), rows).token_ids, minlength=10)
    assert (counts - 500).abs().max() < 6 * math.sqrt(500)


@pytest.mark.parametrize("kwargs", [{"temperature": 1e6, "top_p": 0.99}, {"temperature": 1e300}], ids=str)
def test_logits_of_minus_infinity_are_never_drawn(kwargs):
    logits = torch.zeros(1, 6).index_fill_(1, torch.tensor([0, 4]), -math.inf)
    rows = [SamplingRow(**kwargs, position=i) for i in range(500)]
    assert set(sample(logits.expand(500, -1), rows).token_ids.tolist()) == {1, 2, 3, 5}


# --- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_composition_and_order_do_not_matter(dtype):
    rows = mixed_rows()
    logits = normal(len(rows), 2000, seed=6).to(dtype)
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [row]) for i, row in enumerate(rows)]
    assert together.token_ids.tolist() == [one.token_ids.item() for one in alone]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled.token_ids.tolist() == [together.token_ids[i].item() for i in order]
    for i, one in enumerate(alone):
        assert one.read()[0] == together.read()[i] == shuffled.read()[order.index(i)]


def test_greedy_rows_among_random_ones_are_greedy():
    rows = [GREEDY if i % 2 else SamplingRow(temperature=1, key=9, position=i) for i in range(40)]
    logits = normal(40, 500, seed=7, scale=1.0)
    token_ids, greedy = sample(logits, rows).token_ids, logits.argmax(-1)
    assert torch.equal(token_ids[1::2], greedy[1::2])
    assert (token_ids[::2] != greedy[::2]).sum() > 10


def test_global_random_state_is_neither_read_nor_changed():
    rows = mixed_rows()
    logits = normal(len(rows), 100)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(sample(logits, rows).token_ids)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


def test_logits_and_rows_are_left_as_they_are():
    rows = mixed_rows()
    logits = normal(len(rows), 100)
    before = logits.clone()
    sample(logits, rows)
    assert torch.equal(logits, before)
    assert rows == mixed_rows()


def test_rounding_errors_of_logits_matter_only_at_near_ties():
    """As between world sizes: of 4000 draws from 1000 tokens, a change of 1e-6 moves next to none."""
    logits = normal(1, 1000).expand(4000, -1)
    rows = [SamplingRow(temperature=1, key=77, position=i) for i in range(4000)]
    moved = sample(logits + 1e-6 * normal(4000, 1000, seed=1, scale=1), rows).token_ids
    assert (moved != sample(logits, rows).token_ids).sum() <= 2


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_logits_that_are_nan_draw_a_token_too(options):
    """As of a model that overflows: other rows are drawn as ever, and a GPU is not asked for a place that is not."""
    logits, row = normal(3, 2000), SamplingRow(**options, key=5, position=7)
    expected = sample(logits, [row] * 3).token_ids
    logits[1] = math.nan
    drawn = sample(logits, [row] * 3).token_ids
    assert drawn[[0, 2]].equal(expected[[0, 2]])
    assert 0 <= drawn[1] < 2000


def test_keys_and_positions_give_other_draws():
    logits = torch.zeros(1, 10_000)
    rows = [SamplingRow(temperature=1, key=request_key(0, 0, i), position=p) for i in range(5) for p in range(5)]
    assert len(set(sample(logits.expand(25, -1), rows).token_ids.tolist())) >= 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_matter():
    rows = mixed_rows()
    logits = normal(len(rows), 5000, seed=8)
    assert torch.equal(sample(logits.cuda(), rows).token_ids.cpu(), sample(logits, rows).token_ids)


@pytest.mark.gpu
def test_logits_that_are_nan_do_not_end_a_gpu_process():
    rows = mixed_rows()
    drawn = sample(torch.full((len(rows), 5000), math.nan, device="cuda"), rows).token_ids.cpu()
    assert ((drawn >= 0) & (drawn < 5000)).all()


# --- penalties and suppression ---------------------------------------------------------------------------------------


def test_repetition_penalty_is_that_of_transformers():
    logits = normal(3, 50)
    prompts, outputs = [(1, 1, 2), (3,), ()], [(4, 1), (), (49, 0, 49)]
    rows = [
        SamplingRow(repetition_penalty=penalty, history=said(*output, prompt=prompt))
        for penalty, prompt, output in zip((1.5, 0.7, 3.0), prompts, outputs, strict=True)
    ]
    for row, before, after in zip(rows, logits, penalised(logits, rows), strict=True):
        processor = RepetitionPenaltyLogitsProcessor(row.repetition_penalty)
        ids = torch.tensor([row.history.token_ids])
        torch.testing.assert_close(after, processor(ids, before[None].clone())[0])


def test_presence_and_frequency_count_the_output_only(monkeypatch):
    rows = [
        SamplingRow(presence_penalty=0.5, frequency_penalty=0.25, history=said(2, 3, 3, prompt=(1, 2))),
        GREEDY,
        SamplingRow(frequency_penalty=-1.0, history=said(*(0,) * 10)),
        SamplingRow(frequency_penalty=1.0, presence_penalty=1.0),
    ]
    logits = normal(4, 6)
    scores, expected = penalised(logits, rows), logits.clone()
    monkeypatch.setattr(penalties, "MOST_TOKENS", 20)
    assert scores.equal(penalised(logits, rows))  # two rows at a time
    for row, values, history in zip(rows, expected, told_by(rows), strict=True):
        for token, count in Counter(history.token_ids[history.prompt_len :]).items():
            values[token] -= row.presence_penalty + count * row.frequency_penalty
    torch.testing.assert_close(scores, expected)


def test_penalties_come_before_temperature_and_change_greedy_rows_too():
    logits = torch.tensor([[3.0, 2.9, 0.0]])
    assert sample(logits, [SamplingRow(presence_penalty=0.5, history=said(0))]).token_ids.item() == 1
    # Scaled first, the penalty would be a tenth of the gap between the two.
    row = SamplingRow(temperature=0.01, presence_penalty=0.5, history=said(0), key=4)
    assert sample(logits, [row]).token_ids.item() == 1


def test_where_nothing_was_said_nothing_is_penalised():
    logits = normal(2, 10)
    scores = penalised(logits, [SamplingRow(repetition_penalty=2.0, history=history) for history in (None, said(3))])
    assert (scores != logits).nonzero().tolist() == [[1, 3]]


def test_suppressed_tokens_are_never_drawn():
    logits = torch.tensor([[9.0, 8.0, 7.0, 0.0]])
    row = SamplingRow(suppressed_token_ids=(0, 1))
    assert sample(logits, [row]).token_ids.item() == 2
    rows = [replace(row, temperature=5.0, position=i) for i in range(300)] + [GREEDY]
    token_ids = sample(logits.expand(301, -1), rows).token_ids.tolist()
    assert set(token_ids[:-1]) == {2, 3}
    assert token_ids[-1] == 0


def test_end_tokens_that_the_model_does_not_have_suppress_no_other():
    """A tokenizer may have more tokens than its model."""
    logits = torch.tensor([[1.0, 2.0, 3.0], [9.0, 1.0, 2.0]])
    assert sample(logits, [SamplingRow(suppressed_token_ids=(2, 3)), GREEDY]).token_ids.tolist() == [1, 0]
    row = SamplingRow(suppressed_token_ids=(3, 7))
    assert sample(logits, [row, replace(row, temperature=1e-4)]).token_ids.tolist() == [2, 0]


def test_top_k_counts_what_suppression_leaves():
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0]])
    rows = [SamplingRow(temperature=5.0, top_k=2, position=i, suppressed_token_ids=(0,)) for i in range(300)]
    assert set(sample(logits.expand(300, -1), rows).token_ids.tolist()) == {1, 2}


@pytest.mark.parametrize("options", [{"repetition_penalty": 2.0}, {"presence_penalty": 1.5, "frequency_penalty": 1.0}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_late_token_counts_like_a_known_one(options, temperature):
    """It is found among the tokens of the step before."""
    logits, previous = normal(20, 12, seed=4), torch.arange(100, 120) % 12
    known, late = [], []
    for i in range(20):
        row = SamplingRow(temperature=temperature, key=i, position=3, **options)
        place = 19 - i
        known.append(replace(row, history=said(5, i % 12, int(previous[place]))))
        late.append(replace(row, history=said(5, i % 12, late=place)) if i % 3 else known[-1])
    drawn = sample(logits, alone(late), previous).token_ids.tolist()
    assert drawn == sample(logits, alone(known)).token_ids.tolist()
    unknown = [replace(row, history=replace(row.history, late=None)) for row in late]
    assert drawn != sample(logits, alone(unknown)).token_ids.tolist()


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_logits(dtype):
    logits = normal(4, 300, seed=9).to(dtype)
    shape = {"temperature": 3.0, "suppressed_token_ids": (1,), "key": 5, "repetition_penalty": 2.0}
    rows = [SamplingRow(logprobs=count, position=i, **shape) for i, count in enumerate((0, 1, 5, 300))]
    sampled = sample(logits, rows)
    for i, row in enumerate(rows):
        reference = logits[i].float().log_softmax(-1).tolist()
        order = sorted(range(300), key=lambda token: (-reference[token], token))
        token = int(sampled.token_ids[i])
        _, report = sampled.read()[i]
        assert report.token_ids == [token] + [other for other in order[: row.logprobs] if other != token]
        assert report.logprobs == pytest.approx([reference[other] for other in report.token_ids])
        assert report.ranks == [1 + sum(value > reference[other] for value in reference) for other in report.token_ids]


def test_tokens_of_equal_probability_share_a_rank_and_are_listed_by_id():
    logits = torch.tensor([[1.0, 5.0, 2.0, 2.0, 5.0, 2.0]])
    ((_, report),) = sample(logits, [SamplingRow(logprobs=4)]).read()
    assert (report.token_ids, report.ranks) == ([1, 4, 2, 3], [1, 1, 3, 3])
    (_, narrow), (_, wide) = sample(logits.expand(2, -1), [SamplingRow(logprobs=4), SamplingRow(logprobs=100)]).read()
    assert narrow == report
    assert wide.token_ids == [1, 4, 2, 3, 5, 0]
    assert wide.ranks == [1, 1, 3, 3, 3, 6]


def test_only_rows_that_ask_get_logprobs():
    sampled = sample(torch.zeros(3, 4), [GREEDY, SamplingRow(logprobs=0), GREEDY])
    first, second, third = (report for _, report in sampled.read())
    assert first is third is None
    assert second is not None
    assert second.token_ids == [0]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_plain_greedy_row_is_the_shared_one():
    params = SamplingParams(temperature=0, top_k=5, seed=3, min_tokens=2)
    assert sampling_row(params, 99, 2, 2, [0]) is GREEDY
    assert sampling_row(SamplingParams(temperature=0, logprobs=0), 99, 1, 0) == SamplingRow(logprobs=0)


def test_a_random_row():
    params = SamplingParams(temperature=0.5, top_k=-1, top_p=0.9, min_p=0.1)
    row = sampling_row(params, 99, 2, 1)
    assert row == SamplingRow(temperature=0.5, top_k=0, top_p=0.9, min_p=0.1, key=99, position=3)


def test_eos_and_stop_tokens_are_suppressed_until_min_tokens_are_out():
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[7, 5])
    rows = [sampling_row(params, 0, 1, out, eos_token_ids=[2, 7]) for out in range(3)]
    assert [row.suppressed_token_ids for row in rows] == [(2, 5, 7), (2, 5, 7), ()]


def test_rows_are_small_in_a_broadcast():
    greedy = [sampling_row(SamplingParams(temperature=0), i, 1, 0) for i in range(65)]
    assert len(pickle.dumps(greedy)) - len(pickle.dumps(greedy[:1])) <= 64 * 3
    random = [sampling_row(SamplingParams(), request_key(0, i, 0), 1, 0) for i in range(65)]
    assert len(pickle.dumps(random)) <= 65 * 100
    assert pickle.loads(pickle.dumps(random)) == random
