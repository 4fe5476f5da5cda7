"""The command for an NVLink machine, as far as it goes without one: its dry run, what it finds wrong, its verdict."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from perf import kernel_many_gpus
from perf.kernels import correctness, figures, peers, verdict
from perf.kernels.correctness import LAYERS, WrongResult, cases_of, check
from perf.kernels.figures import FIGURE_4, FIGURE_10, Measured, figure_4, figure_10, floor_us, key, write_csv
from perf.kernels.ours import open_ours, preference
from perf.kernels.peers import PEERS, Bench, Peer, sort_out_wrong, vote
from perf.kernels.problem import Problem, drawn
from perf.kernels.report import DRY, Run, write
from perf.kernels.timers import Contestant, Time, slowest
from perf.kernels.verdict import Goal, judge, why_not_judged, word
from tokenweave.comm.communicator import ShardedChannel
from tokenweave.comm.group import join
from tokenweave.comm.norm import Norm
from tokenweave.cost.collectives import read_collectives

ROOT = Path(__file__).parents[1]
DRY_RUN_TIMEOUT_S = 120
LAUNCH = (
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "127.0.0.1:0",
    "--local-addr",
    "127.0.0.1",
    "--nproc-per-node",
    "2",
)

# The header lines of the published files.
PUBLISHED_4 = (
    "BL,hidden_size,full_rms_norm_us,partial_rms_norm_us,torch_all_reduce_us,multimem_all_reduce_us,fused_arln_us,"
    "simple_fusion_arln_us,multimem_rs_us,multimem_ag_us"
)
PUBLISHED_10 = (
    "num_tokens,hidden_size,num_tokens_per_gpu,fused_arln_us_ctas_2,fused_arln_us_ctas_4,fused_arln_us_ctas_8,"
    "fused_arln_us_ctas_16,fused_arln_us_ctas_32,fused_arln_us_ctas_64,fused_arln_us_ctas_128"
)


# -- the dry run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """(stdout, output folder) of the command on two CPU ranks."""
    folder = tmp_path_factory.mktemp("kernel")
    published = folder / "published"
    published.mkdir()
    for name, header in (("4", PUBLISHED_4), ("10", PUBLISHED_10)):
        row = ",".join(str(number + 64) for number in range(len(header.split(","))))
        (published / f"tokenweave_figure_{name}.csv").write_text(f"{header}\n{row}\n")
    command = [sys.executable, ROOT / "launch" / "ranks.py", *LAUNCH, "-m", "--", "perf.kernel_many_gpus", "--dry-run"]
    options = [f"--output={folder / 'out'}", f"--reference={published}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=DRY_RUN_TIMEOUT_S, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "out"


def test_the_dry_run_writes_every_file_and_says_what_it_is(dry_run):
    stdout, folder = dry_run
    assert f"# The fused kernel on 2 ranks: {DRY}" in stdout
    assert "**not judged: a dry run is no measurement**" in stdout
    assert (folder / "kernel.md").read_text() in stdout
    for picture in ("figure_4.png", "figure_10.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    for table in folder.glob("*.csv"):
        assert table.read_text().startswith(f"# {DRY}\n")


def test_the_dry_run_checks_and_times_every_implementation(dry_run):
    _, folder = dry_run
    result = json.loads((folder / "kernel.json").read_text())
    kernels = {"multimem", "peer two-shot", "peer one-shot"} if shutil.which("g++") else set()
    assert result["note"] == DRY
    assert result["verdict"] == "not judged: a dry run is no measurement"
    assert set(result["checked_cases"]) == {"sharded", "reference"} | kernels
    assert result["headline"] == ("peer two-shot" if kernels else "sharded")
    assert result["missing"]["FlashInfer"]
    for times in result["times"].values():
        assert {column for column in FIGURE_10[2:] if key(result["headline"], column) in times} == set(FIGURE_10[2:])
        assert all(time["min_us"] > 0 for time in times.values())


def test_figures_have_the_published_columns_and_a_dry_run_is_not_taken_for_one(dry_run):
    _, folder = dry_run
    for name, header in (("4", PUBLISHED_4), ("10", PUBLISHED_10)):
        _, columns, *rows = (folder / f"tokenweave_figure_{name}.csv").read_text().splitlines()
        assert columns == header
        assert [row.split(",")[0] for row in rows] == ["4", "8"]
    with pytest.raises(ValueError, match="cannot be used"):
        read_collectives(folder, 8, 16384)


# -- what is wrong is found -------------------------------------------------------------------------------------------


def forgets_the_residual(channel, hidden) -> None:
    channel.residual = None


def loses_a_value(channel, hidden) -> None:
    if len(hidden):
        hidden[-1, 3] = 0


def leaves_nan(channel, hidden) -> None:
    if len(hidden):
        hidden[0, 0] = torch.nan


def rounds_otherwise_on_rank_1(channel, hidden) -> None:
    if channel.rank == 1:
        hidden.mul_(1 + 1e-6)


@contextlib.contextmanager
def planted(fault) -> Iterator[None]:
    """The sharded form goes wrong after each sum."""
    reduce = ShardedChannel._reduce

    def faulty(channel, request):
        result = reduce(channel, request)
        fault(channel, result.data)
        return result

    with mock.patch.object(ShardedChannel, "_reduce", faulty):
        yield


def checked(fault, rows: tuple[int, ...]) -> int:
    """How many cases of the sharded form pass."""
    ranks, done = join(torch.device("cpu"), 60.0), []
    problem = Problem(64, torch.float32, 16, ranks.device)
    try:
        with mock.patch.object(shutil, "which", return_value=None):
            (ours,) = (each for each in open_ours(ranks, problem, Path()).usable if each.name == "sharded")
        with contextlib.nullcontext() if fault is None else planted(fault):
            check(ours, cases_of(LAYERS, rows, (2,)), problem, ranks, lambda: done.append(1))
    finally:
        ranks.leave()
    return len(done)


def test_what_is_right_passes(ranks):
    assert ranks(2).run(checked, None, (1, 5, 16)) == [12, 12]
    assert ranks(3).run(checked, None, (1, 7)) == [8, 8, 8]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (forgets_the_residual, "rank 0, sum 1: off by "),
        (loses_a_value, "rank 0, sum 0: off by "),
        (leaves_nan, "rank 0, sum 0: off by inf of a value"),
        (rounds_otherwise_on_rank_1, "rank 1 holds other bits than rank 0"),
    ],
)
def test_what_is_wrong_is_named_on_every_rank(ranks, fault, said):
    for error in ranks(2).run(checked, fault, (5,), expect_errors=True):
        assert error.type is WrongResult
        assert error.message.startswith("wrong results of sharded, torch.float32 x 64, norm, 5 rows, 2 SMs: ")
        assert said in error.message
        assert error.message.endswith("; nothing was measured")


def command(fault, folder: Path) -> int:
    """The whole command in this process, without twins."""
    arguments = ["kernel_many_gpus", "--dry-run", f"--output={folder}"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", arguments))
        stack.enter_context(mock.patch.object(shutil, "which", return_value=None))
        stack.enter_context(contextlib.nullcontext() if fault is None else planted(fault))
        return kernel_many_gpus.main()


def test_a_wrong_implementation_ends_the_command(ranks, tmp_path):
    assert ranks(2).run(command, loses_a_value, tmp_path / "out") == [1, 1]
    assert ranks(2).output(0).startswith("kernel: wrong results of sharded, ")
    assert ranks(2).output(1) == ""
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_the_plain_forms_are_run(ranks, tmp_path):
    assert ranks(2).run(command, None, tmp_path / "out") == [0, 0]
    missing = json.loads((tmp_path / "out" / "kernel.json").read_text())["missing"]
    assert missing["multimem"] == missing["peer two-shot"] == "its host twin needs g++"
    assert ranks(2).output(1) == ""


def alone(folder: Path) -> int:
    with mock.patch.dict("os.environ", {"WORLD_SIZE": "1"}):
        return command(None, folder)


def test_one_rank_is_told_what_to_do(ranks, tmp_path):
    assert ranks(1).run(alone, tmp_path) == [1]
    assert (
        ranks(1).output(0).startswith("kernel: one rank has nothing to sum: start two or more, with launch/kernel.sh")
    )


def test_partials_differ_by_rank_sum_and_row():
    problem = Problem(64, torch.float32, 16, torch.device("cpu"))
    rows = [
        drawn(problem, f"partial {rank} {number}", 2)[row] for rank in (0, 1) for number in (0, 1) for row in (0, 1)
    ]
    assert len({correctness.digest([row]) for row in rows}) == 8


def test_distance_is_relative_to_the_value_or_its_row():
    wanted = torch.tensor([[1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
    assert correctness.distance(wanted.float(), wanted) == 0
    assert correctness.distance(torch.tensor([[1.0, -1.0, 1.25, 1.0]]), wanted) == 0.25
    assert correctness.distance(wanted * 100, wanted * 80) == 0.25
    assert correctness.distance(torch.empty(0, 4), torch.empty(0, 4)) == 0


# -- figures ----------------------------------------------------------------------------------------------------------


def measured(rows: tuple[int, ...] = (64, 256, 8192)) -> Measured:
    """Microseconds: rows / CTAs for the kernel, ten times the rows for every peer."""
    result = Measured()
    for each in rows:
        times = {key("multimem", column): each / int(column.rpartition("_")[2]) for column in FIGURE_10[3:]}
        times |= {key("multimem", "num_tokens_per_gpu"): 7.0, **{peer.column: 10.0 * each for peer in PEERS}}
        result.times[each] = {name: Time(time, time, time) for name, time in times.items()}
    return result


def test_files_are_read_as_the_published_ones(tmp_path):
    write_csv(tmp_path / "tokenweave_figure_4.csv", FIGURE_4, figure_4(measured(), "multimem", 8192))
    write_csv(tmp_path / "tokenweave_figure_10.csv", FIGURE_10, figure_10(measured(), "multimem", 8192))
    assert (tmp_path / "tokenweave_figure_4.csv").read_text().splitlines()[0] == PUBLISHED_4
    assert (tmp_path / "tokenweave_figure_10.csv").read_text().splitlines()[0] == PUBLISHED_10
    curves = read_collectives(tmp_path, 8, 16384)
    assert curves.plain_s(256) == pytest.approx(2560e-6)
    assert curves.fused_s(256, None) == pytest.approx(2e-6)  # by 128 CTAs
    with (tmp_path / "tokenweave_figure_4.csv").open() as file:
        assert [float(row["fused_arln_us"]) for row in csv.DictReader(file)] == [0.5, 2.0, 64.0]


def a_run(world_size: int) -> Run:
    """Of a machine with GPUs, as it would report it."""
    versions = {"torch": "2.13.0"}
    about = {"date": "2026-01-01", "device": "GPUs", "cuda": "13.0", "nccl": "2.28", "commit": "0", "timer": "events"}
    judgements = judge(measured().by_ctas("multimem"))
    return Run(
        about | {"versions": versions, "rounds": 21},
        Problem(8192, torch.bfloat16, 8192, torch.device("cpu")),
        world_size,
        "multimem",
        {"multimem": 96},
        measured(),
        {"FlashInfer": "it is not installed"},
        judgements,
        word(judgements, ""),
        dry=False,
    )


def test_a_measurement_can_stand_in_for_the_published_files(tmp_path):
    write(a_run(8), tmp_path, None)
    assert read_collectives(tmp_path, 8, 16384).fused_s(8192, 4) == pytest.approx(2048e-6)
    page = (tmp_path / "kernel.md").read_text()
    assert DRY not in page
    assert "- FAIL  8192 rows by 4 CTAs: at most 530 us; measured: 2048.0 us" in page
    assert "- PASS  256 rows by the best count of CTAs: at most 24 us; measured: 2.0 us" in page
    assert page.endswith("**FAIL**\n")
    assert "Missing: FlashInfer, since it is not installed." in page


def test_files_of_another_number_of_ranks_have_other_names(tmp_path):
    write(a_run(4), tmp_path, None)
    names = {path.name for path in tmp_path.glob("*.csv")}
    assert names == {"figure_of_4_ranks_4.csv", "figure_of_4_ranks_10.csv", "peers.csv"}


def test_the_slowest_rank_of_each_round_counts():
    times = slowest([{"a": [1e-6, 5e-6, 2e-6]}, {"a": [4e-6, 1e-6, 3e-6]}])
    assert (times["a"].median_us, times["a"].min_us, times["a"].max_us) == pytest.approx((4.0, 3.0, 5.0))


def test_the_floor_is_that_of_the_line_rate():
    assert floor_us(8192, 8192, torch.bfloat16, 8) == pytest.approx(8192 * 8192 * 2 * 1.125 / 450e3)


def test_cta_counts_fit_the_gpu():
    counts = figures.cta_counts(256, 8, 132)
    assert list(counts) == list(FIGURE_10[2:])
    assert counts["num_tokens_per_gpu"] == 32
    assert figures.cta_counts(32768, 8, 100)["num_tokens_per_gpu"] == 100
    assert "fused_arln_us_ctas_128" not in figures.cta_counts(32768, 8, 100)


def test_the_figures_are_about_what_the_runtime_takes():
    assert next(preference(2)) == "peer two-shot"
    assert next(preference(8)) == "multimem"


def missing_on_rank_1() -> tuple[list[str], dict[str, str]]:
    ranks = join(torch.device("cpu"), 60.0)
    bench = SimpleNamespace(ranks=ranks)
    there = Peer("a_us", "there", "", peers.full_norm)
    gone = Peer("b_us", "gone", "", peers.full_norm, lambda bench: "not here" if dist.get_rank() == 1 else "")
    try:
        usable, missing = vote(bench, (there, gone))
    finally:
        ranks.leave()
    return [peer.label for peer in usable], missing


def test_a_peer_that_one_rank_lacks_is_missing_on_all(ranks):
    assert ranks(2).run(missing_on_rank_1) == [(["there"], {"gone": "not here"})] * 2


def norm_forgotten(bench: Bench, rows: int) -> Contestant:
    x = bench.x[:rows]
    return Contestant(lambda: dist.all_reduce(x, group=bench.ranks.comm), bench.refill(x))


def sorted_out(dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    ranks = join(torch.device("cpu"), 60.0)
    try:
        bench = Bench(ranks, Problem(64, dtype, 16, ranks.device), "no switch")
        usable, missing = vote(bench)
        assert missing["multimem all-reduce"] == "no switch"
        broken = Peer("broken_us", "broken", "", norm_forgotten, hidden=lambda bench, rows: bench.x[:rows])
        left, wrong = sort_out_wrong(bench, [*usable, broken], 6)
    finally:
        ranks.leave()
    return [peer.column for peer in left], wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peer_that_is_wrong_is_not_timed(ranks, dtype):
    for left, wrong in ranks(2).run(sorted_out, dtype):
        assert left == ["full_rms_norm_us", "partial_rms_norm_us", "torch_all_reduce_us", "torch_all_reduce_norm_us"]
        assert list(wrong) == ["broken"]
        assert wrong["broken"].startswith("its result is off by ")


def test_the_norm_that_peers_use_is_the_runtime_s():
    problem = Problem(64, torch.float32, 8, torch.device("cpu"))
    x, residual = drawn(problem, "x", 8), drawn(problem, "residual", 8).clone()
    norm, out, total = Norm(drawn(problem, "weight"), 1e-5), torch.empty(8, 64), x + residual
    peers.add_norm(x, residual, norm.weight, out, norm.eps)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(out, norm(total))


def test_every_peer_has_a_column_of_its_own():
    columns = [peer.column for peer in PEERS]
    assert len(set(columns)) == len(columns)
    assert set(FIGURE_4) - {"BL", "hidden_size", "fused_arln_us"} <= set(columns)


# -- the verdict ------------------------------------------------------------------------------------------------------

FAST = {8192: {2: 800.0, 4: 530.0, 8: 500.0}, 256: {2: 40.0, 8: 24.0, 16: 25.0}}


def test_the_goals_of_the_kernel():
    assert [str(goal) for goal in verdict.GOALS] == [
        "8192 rows by 4 CTAs: at most 530 us",
        "8192 rows by 2 CTAs: at most 800 us",
        "256 rows by the best count of CTAs: at most 24 us",
    ]
    assert word(judge(FAST), "") == "PASS"


@pytest.mark.parametrize(
    ("rows", "ctas", "time_us"), [(8192, 4, 530.1), (8192, 2, 801.0), (256, 8, 24.1), (8192, 4, None)]
)
def test_one_missed_goal_fails(rows, ctas, time_us):
    times = {each: dict(by_ctas) for each, by_ctas in FAST.items()}
    if time_us is None:
        del times[rows][ctas]
    else:
        times[rows][ctas] = time_us
    judgements = judge(times)
    assert word(judgements, "") == "FAIL"
    assert sum(not each.passed for each in judgements) == 1


def test_judgements_are_readable():
    passed, failed = judge({64: {2: 3.0}}, [Goal(64, 2, 3.0), Goal(128, None, 3.0)])
    assert str(passed) == "PASS  64 rows by 2 CTAs: at most 3 us; measured: 3.0 us"
    assert str(failed) == "FAIL  128 rows by the best count of CTAs: at most 3 us; measured: not measured"
    assert word([], "") == "FAIL"


def test_only_what_the_goals_are_for_is_judged():
    assert why_not_judged(False, 8, 8192, torch.bfloat16, "multimem") == ""
    assert why_not_judged(True, 8, 8192, torch.bfloat16, "multimem") == "a dry run is no measurement"
    assert why_not_judged(False, 8, 8192, torch.bfloat16, "sharded") == "the kernel was not measured"
    for world_size, hidden_size, dtype in (
        (4, 8192, torch.bfloat16),
        (8, 64, torch.bfloat16),
        (8, 8192, torch.float16),
    ):
        said = why_not_judged(False, world_size, hidden_size, dtype, "multimem")
        assert said == "the goals are for 8 GPUs and hidden 8192 in torch.bfloat16"
    assert word(judge({}), "why") == "not judged: why"


# -- the shell script -------------------------------------------------------------------------------------------------


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "launch" / "kernel.sh", *arguments], capture_output=True, text=True, timeout=30
    )


def test_help_needs_no_set_up():
    done = script("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: launch/kernel.sh [--nproc N]")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc", "none"], "tokenweave: --nproc must be a whole number from 2 on, not 'none'\n"),
        (["--nproc", "1"], "tokenweave: --nproc must be a whole number from 2 on, not '1'\n"),
        (["--nproc="], "tokenweave: --nproc needs a value; see --help\n"),
        (["--output"], "tokenweave: --output needs a value; see --help\n"),
        (["--fast"], "tokenweave: unknown option --fast; see --help\n"),
    ],
)
def test_a_wrong_option_is_refused_before_the_set_up(arguments, said):
    done = script(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
