"""The whole command without a GPU: two ranks over gloo, a published architecture shrunk; the kernel's part is not run
here (tests/test_kernel_many_gpus.py does), what it wrote is given."""

import json
import sys

from perf.paper import __main__ as command
from perf.paper import kernel
from tests.perf.paper.test_report import KERNEL

LINE = "--dry-run --models Mixtral-8x22B --figures 4 11 12 --prompts 16 --rounds 1"


def test_it_measures_reports_and_resumes(tmp_path, monkeypatch, capsys):
    kernels: list[list[str]] = []

    def pretend(setting, folder, options, timeout_s):
        kernels.append(options)
        (folder / "kernel.json").write_text(json.dumps(KERNEL))

    monkeypatch.setattr(kernel, "run", pretend)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    line = [*LINE.split(), "--out", str(tmp_path)]
    assert command.main(line) == 0
    assert "report.md" in capsys.readouterr().out
    journal = (tmp_path / "journal.jsonl").read_text()
    assert len(journal.splitlines()) == 3
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["note"] == "dry run, not a measurement"
    assert {row["model"] for row in figures["figures"]} == {"", "tiny Mixtral-8x22B"}
    modes = {row["mode"] for row in figures["figures"] if row["figure"] == "12"}
    assert modes == {"off", "fused", "weave", "auto", "nocomm"}
    assert all(row["median"] > 0 for row in figures["figures"])
    assert command.main(line) == 0
    assert (tmp_path / "journal.jsonl").read_text() == journal
    assert kernels == [["--dry-run"]]
