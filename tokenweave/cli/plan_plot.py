"""The plot of `tokenweave plan`: step times and gains by token count."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tokenweave.cli.plan_report import Report


def draw(report: Report, path: Path) -> None:
    """Two panels side by side: seconds of one prompt's prefill, and gains over the baseline."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    times, gains = figure.subplots(1, 2)
    tokens = [gain.tokens for gain in report.gains]
    off_ms = [gain.off_s * 1e3 for gain in report.gains]
    times.plot(tokens, off_ms, "o-", color="0.3", label="off: all-reduce, then norm")
    times.plot(
        tokens, [ms / gain.planned for ms, gain in zip(off_ms, report.gains)], "s-", color="C0", label="the plan"
    )
    times.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="prefill, ms")
    for name, colour, style in (("fused", "C1", "^-"), ("weave", "C0", "s-"), ("nocomm", "0.6", "--")):
        label = "without sums" if name == "nocomm" else name
        gains.plot(tokens, [getattr(gain, name) for gain in report.gains], style, color=colour, label=label)
    gains.axhline(1.0, color="0.3", linewidth=0.8)
    gains.set(xscale="log", xlabel="prompt tokens", ylabel="times as fast as off")
    for axes in (times, gains):
        axes.set_xticks(tokens, [f"{count // 1024}k" if count >= 1024 else str(count) for count in tokens])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{report.model} on {report.size.world_size} x {report.hardware}, {report.dtype}, predicted")
    figure.savefig(path, dpi=120)
