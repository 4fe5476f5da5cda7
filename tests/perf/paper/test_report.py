"""The figures from results that were never measured: which point belongs where, the arithmetic, the page."""

import csv
from pathlib import Path

import pytest

from perf.overlap.points import Setting
from perf.paper.cells import cells
from perf.paper.options import parse, scale_of, settings
from perf.paper.plan import FIGURES, FULL, points
from perf.paper.published import LLAMA, MIXTRAL, Key, quoted
from perf.paper.report import Run, write

ABOUT = {
    "date": "2026-01-02", "gpus": "8 x Some GPU", "cpu": "Some CPU", "versions": {"torch": "2.13.0"},
    "kernel": "Linux", "commit": "abc1234", "command": "the command",
}  # fmt: skip
LLAMA_8, MIXTRAL_8 = (Setting(name, "none", 0.0, 8, 1, "cuda") for name in (LLAMA, MIXTRAL))
SECONDS = {"off": 0.36, "off, NCCL": 0.3, "fused": 0.29, "weave": 0.25, "auto": 0.25, "nocomm": 0.24}
KERNEL = {
    "world_size": 8,
    "headline": "multimem",
    "times": {
        "8192": {
            name: {"median_us": us, "min_us": us, "max_us": us}
            for name, us in {
                "multimem: num_tokens_per_gpu": 1.0,
                "multimem: fused_arln_us_ctas_2": 700.0,
                "multimem: fused_arln_us_ctas_4": 510.0,
                "peer two-shot: fused_arln_us_ctas_4": 1.0,
                "torch_all_reduce_us": 640.0,
            }.items()
        }
    },
}


def result_of(point) -> dict:
    if point.measure == "prefill":
        return {"seconds": {mode: [value] * 2 for mode, value in SECONDS.items()}, "missing": {"vLLM": "not here"}}
    rates = {"off": 10_000.0, "weave": 12_000.0, "nocomm": 13_000.0}
    return {"figures": {mode: {"total tokens/s": [rate]} for mode, rate in rates.items()}}


def results(figures=FIGURES) -> list:
    listed = [*points(LLAMA_8, FULL, figures, 131072, True), *points(MIXTRAL_8, FULL, figures, 65536, False)]
    return [(point, result_of(point)) for point in listed]


def test_every_point_is_measured_once():
    listed = [point for point, _ in results()]
    assert len(listed) == len(set(listed)) == (7 + 4 * 4) + (7 + 4)
    assert {point.chunk_tokens for point in listed if point.setting == MIXTRAL_8 and point.measure == "mix"} == {4096}
    assert list(points(LLAMA_8, FULL, ["4", "10"], 131072, True)) == []
    assert [point.x for point in points(LLAMA_8, FULL, ["11"], 4096, True)] == [1024, 2048, 4096]


def test_ours_stands_beside_the_published():
    found = {cell.key: cell for cell in cells(results(), KERNEL, quoted(), FIGURES, FULL, LLAMA)}
    cell = found[Key("11", LLAMA, 8, 8192, "weave")]
    assert (cell.value.median, cell.published) == (250.0, 279.8)
    assert found[Key("11", LLAMA, 8, 8192, "off")].value.median == 300.0  # the fastest of its baselines
    assert found[Key("1", LLAMA, 8, 8192, "off")].value.median == pytest.approx(0.2)
    assert found[Key("12", MIXTRAL, 8, "sharegpt", "off", 4096)].published == 10355
    assert found[Key("13", LLAMA, 8, "sharegpt", "off", 8192)].published == 12048
    assert not [key for key in found if key.figure == "13" and key.model == MIXTRAL]
    assert found[Key("4", "", 8, 8192, "fused_arln_us")].value.median == 510.0
    assert found[Key("10", "", 8, 8192, "fused_arln_us_ctas_2")].published == 1571.1
    assert Key("4", "", 8, 8192, "torch_all_reduce_us") in found


def page_of(folder: Path, figures=FIGURES, **changes) -> str:
    found = cells(results(figures), KERNEL, quoted(), figures, FULL, LLAMA)
    given = {"kernel": folder / "kernel", "dry": False} | changes
    write(Run(ABOUT, results(figures), found, quoted(), figures, **given), folder)
    return (folder / "report.md").read_text()


def test_the_page(tmp_path):
    text = page_of(tmp_path)
    for picture in tmp_path.glob("*.png"):
        assert f"({picture.name})" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {f"figure_{n}.png" for n in (1, 11, 12, 13)}
    assert "(kernel/figure_4.png)" in text
    assert "1.20 [1.27]" in text  # 300 / 250 beside 356.0 / 279.8
    assert "12000 [13374]" in text
    assert "20.0% [18.7%]" in text
    assert "arXiv 2505.11329" in text
    assert "vLLM (not here)" in text
    assert "dry run" not in text


def test_the_csv_holds_every_figure(tmp_path):
    page_of(tmp_path)
    with (tmp_path / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["figure"] for row in rows} == {*FIGURES}
    mine = [row for row in rows if (row["figure"], row["mode"], row["x"]) == ("11", "weave", "8192")]
    assert [(row["model"], float(row["median"]), row["published"]) for row in mine] == [
        (LLAMA, 250.0, "279.8"),
        (MIXTRAL, 250.0, "199.4"),
    ]


def test_a_dry_run_says_so_everywhere(tmp_path):
    assert "dry run, not a measurement" in page_of(tmp_path, ["4", "1"], dry=True)
    for path in tmp_path.glob("*.csv"):
        assert path.read_text().startswith("# dry run, not a measurement\n")


def test_what_could_not_be_measured_is_missing(tmp_path):
    run = Run(ABOUT, [], [], quoted(), ["4", "10"], False, None, {"4": "no P2P", "10": "no P2P"})
    assert "figure 4 is missing: no P2P" in write(run, tmp_path)
    assert "Missing: no P2P." in (tmp_path / "report.md").read_text()


# -- the command line -------------------------------------------------------------------------------------------------


def test_defaults():
    options = parse([], gpus=8)
    assert scale_of(options) == FULL
    assert [(s.shape, s.ranks, s.device) for s in settings(options)] == [(LLAMA, 8, "cuda")]
    options = parse(["--dry-run", "--models", "qwen2.5-72b", "--prompts", "8"], gpus=0)
    assert [(s.shape, s.ranks, s.device) for s in settings(options)] == [("tiny Qwen2.5-72B", 2, "cpu")]
    assert scale_of(options).prompts == [8]
    assert parse(["--dry-run", "--figures", "11", "1"], gpus=0).figures == ["1", "11"]


@pytest.mark.parametrize(
    ("line", "gpus", "said"),
    [
        ("", 0, "--dry-run needs none"),
        ("", 1, "two ranks or more"),
        ("--nproc 8", 4, "torch sees 4 GPUs"),
        ("--models gpt", 8, "unknown model 'gpt'"),
        ("--figures 2", 8, "invalid choice"),
        ("--requests 0", 8, "at least 1"),
    ],
)
def test_refusals(line, gpus, said, capsys):
    with pytest.raises(SystemExit) as error:
        parse(line.split(), gpus)
    assert error.value.code == 2
    assert said in capsys.readouterr().err
