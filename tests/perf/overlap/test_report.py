"""The report, from results that were never measured: every file, figure, plot and goal."""

import csv
import json

import pytest

from perf.overlap.goals import findings
from perf.overlap.points import Point, Setting
from perf.overlap.report import write_report
from perf.overlap.rows import COLUMNS, rows
from tokenweave.trace.spans import Span

ABOUT = {
    "date": "2026-01-02", "cpu": "Some CPU", "cores": 2, "threads": 2, "python": "3.11.7", "kernel": "Linux 6.1",
    "versions": {"torch": "2.13.0"}, "commit": "abc1234", "code": "0123456789ab", "load": 0.1, "command": "the command",
}  # fmt: skip
REAL, PACED = Setting("llama-512x8", "real", 1000.0), Setting("llama-512x8", "paced", 500.0)


def compared(scale: float, weave: float = 0.35) -> dict:
    """Seconds of two rounds, one as the other."""
    own = {"off": 0.6, "fused": 0.58, "weave": weave, "auto": weave, "nocomm": 0.3, "communication alone": 0.28}
    seconds = own | {"transformers TP": 0.7}
    return {
        "seconds": {name: [scale * value] * 2 for name, value in seconds.items()},
        "cpu_s": {name: [scale * 0.3, scale * 0.31] for name in own},
        "auto_chose": "weave",
        "missing": {"another peer": "it is not installed"},
    }


def spans() -> list[list]:
    """A woven step of three layers: A computes, then B, each sum beside the other's segment."""
    listed = []
    for at in range(12):
        half, name = at % 2, ("attn", "mlp")[at // 2 % 2]
        start = at * 1_000_000
        listed.append(Span(0, 1, "compute", "segment", half, name, start, start + 900_000, 512))
        listed.append(Span(0, 1, "comm", "sum", half, name, start + 900_000, start + 1_700_000, 512))
    return [list(span) for span in listed]


STRANDS = {"segments_s": [[0.1, 0.1, 0.0]] * 2, "sums_s": [[0.1, 0.1]] * 2, "compute_s": 0.4}
RESULTS = [
    (Point(REAL, "prefill", 512, 2), compared(0.5)),
    (Point(REAL, "prefill", 1024, 2), compared(1.0)),
    (Point(REAL, "decode", 4, 2), compared(0.01)),
    (
        Point(REAL, "mix", "fixed", 1),
        {"figures": {"off": {"output tokens/s": [10.0], "TTFT p50": [0.2]}}, "words": "16"},
    ),
    (Point(REAL, "timeline", 1024, 1), {"spans": {"off": spans(), "weave": spans()}, "strands": STRANDS}),
]


@pytest.fixture
def folder(tmp_path):
    said = write_report(RESULTS, ABOUT, tmp_path)
    assert str(tmp_path / "report.md") in said
    return tmp_path


def test_the_report_embeds_every_plot_and_says_where_it_was_made(folder):
    text = (folder / "report.md").read_text()
    plots = {path.name for path in folder.glob("*.png")}
    stem = "llama-512x8-real-1000"
    kinds = ("prefill", "decode", "timeline-off", "timeline-weave")
    assert plots == {f"{stem}-{kind}.png" for kind in kinds}
    assert all(f"({name})" in text for name in plots)
    for fact in ("Some CPU", "torch 2.13.0", "abc1234", "tc tbf", "the command", "another peer (it is not installed)"):
        assert fact in text
    assert "simulated" not in text
    assert "| weave | 152.5 (150.0-155.0) | 305.0 (300.0-310.0) |" in text
    assert "| weave | 175.0 (175.0-175.0) | 350.0 (350.0-350.0) |" in text
    assert "order of work takes 500.0 ms: 75% of what can be hidden" in text
    assert "A half's sum takes 100.0 ms at line rate, and 0.8 ms beside compute (median)." in text
    assert "not quiet" not in text
    assert "| off | 10.0 | 200.0 |" in text
    assert "`auto` chose weave at 512, weave at 1024." in text


def test_a_paced_link_is_labelled_simulated(tmp_path):
    write_report([(Point(PACED, "prefill", 1024, 2), compared(1.0))], ABOUT, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**The link is simulated**" in text
    assert "## llama-512x8, W=2, simulated 500 Mbit/s link" in text


def test_what_is_missing_at_some_points_only_says_where(tmp_path):
    there, gone = compared(1.0), compared(1.0)
    gone["missing"] = gone["missing"] | {"transformers TP": "it failed"}
    results = [(Point(REAL, "prefill", 512, 2), there), (Point(REAL, "prefill", 1024, 2), gone)]
    write_report(results, ABOUT, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Missing: another peer (it is not installed); transformers TP at prefill 1024 (it failed)." in text


def test_a_busy_machine_is_told_of(tmp_path):
    result = compared(1.0)
    result["seconds"]["nocomm"] = [0.3, 0.6]
    write_report([(Point(REAL, "prefill", 1024, 2), result)], ABOUT, tmp_path)
    assert "compute alone varied by up to 100%" in (tmp_path / "report.md").read_text()


def test_csv_and_json_hold_the_same_figures(folder):
    with (folder / "results.csv").open() as file:
        listed = list(csv.DictReader(file))
    whole = json.loads((folder / "results.json").read_text())
    assert whole["about"] == ABOUT
    assert len(listed) == len(whole["figures"]) == len(rows(RESULTS))
    assert [float(row["median"]) for row in listed] == [row["median"] for row in whole["figures"]]
    assert tuple(listed[0]) == COLUMNS
    assert whole["points"][0]["seconds"]["off"] == [0.3, 0.3]
    assert "spans" not in (folder / "results.json").read_text()


def test_figures_of_a_point():
    found = {(row.mode, row.figure): row.value.median for row in rows(RESULTS[1:2])}
    assert found["ideal", "latency"] == pytest.approx(0.3)
    assert found["weave", "hidden share"] == pytest.approx(0.25 / 0.3)
    assert found["weave", "exposed"] == pytest.approx(0.05)
    assert found["transformers TP", "gain over off"] == pytest.approx(0.6 / 0.7)
    assert not {("ideal", "hidden share"), ("communication alone", "gain over off")} & found.keys()


def judged(weave: float, tokens: int = 1024) -> dict[str, bool]:
    return {one.what: one.met for one in findings([(Point(REAL, "prefill", tokens, 2), compared(1.0, weave))])}


def test_goals_are_met_and_missed():
    met = judged(weave=0.35)
    assert len(met) == 5
    assert all(met.values())
    missed = judged(weave=0.5)
    assert not missed["hidden by weave, 1024 tokens"]
    assert not missed["transformers TP / weave, 1024 tokens"]
    assert set(judged(weave=0.7, tokens=512).values()) == {False}
    assert set(judged(weave=0.5, tokens=512)) == {"weave against off, 512 tokens", "auto against off, 512 tokens"}


def test_one_rank_is_held_against_transformers():
    alone = Setting("llama-512x8", "none", 0.0, 1, 2)
    rates = {"off": {"output tokens/s": [30.0]}, "transformers TP": {"output tokens/s": [10.0]}}
    found = findings(
        [(Point(alone, "prefill", 1024, 2), compared(1.0)), (Point(alone, "mix", "mixed", 1), {"figures": rates})]
    )
    assert [(one.found.split()[0], one.met) for one in found] == [("1.17", True), ("3.00", True)]
