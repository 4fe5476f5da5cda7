"""Report: results as CSV, JSON, plots, and one page of Markdown that embeds them."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perf.overlap import figures, netns, plots
from perf.overlap.goals import Finding, findings
from perf.overlap.points import Point, Setting
from perf.overlap.rows import COLUMNS, Row, rows
from perf.overlap.schedule import Strands, most_hidden, woven_s
from tokenweave.trace import overlap
from tokenweave.trace.spans import Span

Results = Sequence[tuple[Point, dict[str, Any]]]

LINK_WORDS = {
    "real": (
        f"Link: network namespaces, one a rank, joined by veth pairs (MTU {netns.MTU}), their ends shaped by `tc tbf` "
        f"(burst {netns.BURST}, latency {netns.LATENCY}), a torchrun in each."
    ),
    "paced": (
        "**The link is simulated**: the bytes really go over loopback, then the comm lane sleeps until a wire of that "
        'speed would be done. Modes named "sleeps only" send nothing and only sleep: the difference is what gloo\'s '
        "own CPU time takes on cores that are full."
    ),
    "none": "Link: what joins the ranks anyway, unpaced.",
}
TERMS = (
    "Medians over rounds in which all modes take turns (A B A B), with (min-max); a round lasts until its last rank is "
    "done. `nocomm`: nothing is sent. `communication alone`: what a step of `fused` sends, with nothing computed. "
    "`ideal`: the longer of these two, round by round. Exposed: beyond `nocomm`. Hidden: (off - mode) / (off - ideal), "
    "of medians."
)
FIGURES = {"latency": (1e3, ".1f", "ms"), "gain over off": (1.0, ".2f", "x"), "exposed": (1e3, ".1f", "ms")}
QUIET = 1.25  # largest / least
FIGURES |= {"hidden share": (100.0, ".0f", "%"), "CPU of a rank": (1e3, ".1f", "ms")}


def write_report(results: Results, about: dict[str, Any], folder: Path) -> str:
    """Write results.csv, results.json, the plots and report.md to `folder`. Returns what to tell the user."""
    results = list(results)
    table = rows(results)
    write_csv(table, folder / "results.csv")
    write_json(results, table, about, folder / "results.json")
    found = findings(results)
    sections = [section for setting in settings_of(results) for section in describe(setting, results, table, folder)]
    text = "\n\n".join([*head(results, about), *goals(found), *sections]) + "\n"
    (folder / "report.md").write_text(text)
    met = sum(one.met for one in found)
    return f"written: {folder / 'report.md'}; {met} of {len(found)} goals met"


def write_csv(table: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row.cells for row in table)


def write_json(results: Results, table: Sequence[Row], about: dict[str, Any], path: Path) -> None:
    """Everything but the spans: what was measured, round by round, and the figures made of it."""
    points = [asdict(point) | {k: v for k, v in result.items() if k != "spans"} for point, result in results]
    path.write_text(
        json.dumps(
            {"about": about, "points": points, "figures": [dict(zip(COLUMNS, row.cells)) for row in table]}, indent=1
        )
        + "\n"
    )


def settings_of(results: Results) -> list[Setting]:
    return list(dict.fromkeys(point.setting for point, _ in results))


def head(results: Results, about: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    first = results[0][0].setting
    code = f"commit {about['commit']} (code {about['code']})"
    dtype = "fp32" if first.device == "cpu" else "the dtype that the model's config states"
    place = f"{about['gpus']}; " if about.get("gpus") else ""
    machine = (
        f"{place}{about['cpu']}, {about['cores']} cores, {first.ranks} ranks of {first.threads} threads on "
        f"{first.device}; {dtype}; {versions}, Python {about['python']}, {about['kernel']}; {code}. "
        f"Load average when it started: {about['load']:.1f}."
    )
    made = f"Made by `{about['command']}`."
    return [
        f"# What overlap is worth, {about['date']}",
        machine,
        LINK_WORDS[first.link],
        TERMS,
        made,
        *unquiet(results),
        *absent(results),
    ]


def unquiet(results: Results) -> list[str]:
    """A warning, where compute alone did not take the same time in every round."""
    varied = [figures.varied(result["seconds"]["nocomm"]) for _, result in results if "seconds" in result]
    if not varied or max(varied) < QUIET:
        return []
    return [
        f"**The machine was not quiet**: compute alone varied by up to {max(varied) - 1:.0%} between rounds. Figures "
        "by difference (exposed, hidden) mean little then; measure again."
    ]


def absent(results: Results) -> list[str]:
    """The peers and baselines that could not take part, why, and at which points where it is not all of them."""
    told = [(point, result["missing"]) for point, result in results if "missing" in result]
    reasons: dict[tuple[str, str], list[str]] = {}
    for point, missing in told:
        for name, why in missing.items():
            reasons.setdefault((name, why), []).append(f"{point.measure} {point.x}")
    listed = [
        f"{name} ({why})" if len(places) == len(told) else f"{name} at {', '.join(dict.fromkeys(places))} ({why})"
        for (name, why), places in reasons.items()
    ]
    return [f"Missing: {'; '.join(listed)}."] if listed else []


def goals(found: Sequence[Finding]) -> list[str]:
    if not found:
        return []
    lines = [[one.setting, one.what, one.goal, one.found, "met" if one.met else "**missed**"] for one in found]
    return ["## Goals", markdown(["setting", "what", "goal", "found (min-max)", ""], lines)]


def describe(setting: Setting, results: Results, table: Sequence[Row], folder: Path) -> Iterator[str]:
    yield f"## {setting.title}"
    for measure in ("prefill", "decode"):
        mine = [row for row in table if row.point.setting == setting and row.point.measure == measure]
        if mine:
            yield from compared(setting, measure, mine, folder)
            yield chosen([pair for pair in results if pair[0].setting == setting and pair[0].measure == measure])
    for point, result in results:
        if point.setting == setting and point.measure == "mix":
            yield from served(point, result, [row for row in table if row.point == point])
        if point.setting == setting and point.measure == "timeline":
            yield from traced(point, result, folder)


def compared(setting: Setting, measure: str, mine: Sequence[Row], folder: Path) -> Iterator[str]:
    picture = f"{setting.stem}-{measure}.png"
    plots.curves(mine, measure, f"{setting.title}: {measure}", folder / picture)
    yield f"### {measure.capitalize()}"
    yield f"![{measure} of {setting.title}]({picture})"
    xs = list(dict.fromkeys(row.point.x for row in mine))
    modes = list(dict.fromkeys(row.mode for row in mine))
    for figure, (scale, spec, unit) in FIGURES.items():
        cells = {(row.mode, row.point.x): row for row in mine if row.figure == figure}
        if cells:
            lines = [[mode, *(cell(cells.get((mode, x)), scale, spec) for x in xs)] for mode in modes]
            yield markdown([f"{figure}, {unit}", *map(str, xs)], lines)


def cell(row: Row | None, scale: float, spec: str) -> str:
    if row is None:
        return ""
    value = row.value
    if row.point.rounds == 1:
        return f"{value.median * scale:{spec}}"
    return f"{value.median * scale:{spec}} ({value.min * scale:{spec}}-{value.max * scale:{spec}})"


def chosen(results: Results) -> str:
    """What `auto` did, and which baseline is `off`, where there are any."""
    auto = "`auto` chose " + ", ".join(f"{result['auto_chose']} at {point.x}" for point, result in results) + "."
    if not any(figures.baselines_of(result["seconds"]) for _, result in results):
        return auto
    fastest = [(point.x, figures.fastest_off(result["seconds"])) for point, result in results]
    offs = ", ".join(f"{figures.RUNTIME if name == 'off' else name} at {x}" for x, name in fastest)
    return f"{auto} `off` is the fastest of its baselines: {offs}."


def served(point: Point, result: dict[str, Any], mine: Sequence[Row]) -> Iterator[str]:
    yield f"### Request mix: {point.x}, in steps of up to {point.chunk_tokens} tokens"
    over = f" `off` is {result['off']}." if result.get("off", "off") != "off" else ""
    yield f"{result['words']}. Times in ms.{over}"
    names = list(dict.fromkeys(row.figure for row in mine))
    modes = list(dict.fromkeys(row.mode for row in mine))
    cells = {(row.mode, row.figure): row for row in mine}
    lines = [
        [mode, *(cell(cells.get((mode, name)), 1.0 if name.endswith("/s") else 1e3, ".1f") for name in names)]
        for mode in modes
    ]
    yield markdown(["mode", *names], lines)


def traced(point: Point, result: dict[str, Any], folder: Path) -> Iterator[str]:
    """One layer of each traced mode, and where the time of the whole step went."""
    yield f"### Timeline of one layer, {point.x} tokens"
    lines = []
    for mode, listed in result["spans"].items():
        spans = [Span(*fields) for fields in listed]
        picture = f"{point.setting.stem}-timeline-{mode}.png"
        plots.timeline(point, mode, spans, folder / picture)
        yield f"![One layer, {mode}]({picture})"
        mean = overlap.summary(spans)
        times = (mean.compute_s, mean.communication_s, mean.hidden_s, mean.exposed_s, mean.idle_s)
        lines.append([mode, *(f"{seconds * 1e3:.1f}" for seconds in times)])
    yield markdown(["whole step, mean rank, ms", "compute", "communication", "hidden", "exposed", "idle"], lines)
    if result.get("strands"):
        strands = Strands(**result["strands"])
        beside_s = in_flight_s([Span(*fields) for fields in result["spans"]["weave"]])
        yield f"{scheduled(strands)} {of_a_sum(strands.sums_s[0][0], beside_s)}"


def in_flight_s(spans: Sequence[Span]) -> float:
    """The median of a woven step's largest sums, each from when all ranks were in it."""
    sums = [span for span in overlap.in_flight(spans) if span.kind == "sum"]
    most = max(span.tokens for span in sums)
    return statistics.median((span.end_ns - span.start_ns) / 1e9 for span in sums if span.tokens == most)


def of_a_sum(line_s: float, beside_s: float) -> str:
    return (
        f"A half's sum takes {line_s * 1e3:.1f} ms at line rate, and {beside_s * 1e3:.1f} ms beside compute (median)."
    )


def scheduled(strands: Strands) -> str:
    """What limits the weave: its order of work, or what sending costs."""
    most = most_hidden(strands)
    share = "" if most is None else f": {most:.0%} of what can be hidden"
    compute_ms, sums_ms, woven_ms = (
        f"{s * 1e3:.1f} ms" for s in (strands.compute_s, strands.communication_s, woven_s(strands))
    )
    return (
        f"With segments at their fastest when nothing is sent ({compute_ms} in all, not split), sums at line rate "
        f"({sums_ms}) and no CPU time for sending, the weave's order of work takes {woven_ms}{share}. "
        "What weave takes beyond that is gloo, threads and the operating system."
    )


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)
