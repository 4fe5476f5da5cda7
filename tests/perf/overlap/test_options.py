"""The command line: its points, defaults and refusals."""

import pytest

from perf.overlap.options import parse, points


def asked(line: str) -> list:
    return points(parse(line.split()))


def test_the_full_run():
    listed = asked("--threads 2")
    assert len(listed) == 2 * 2 * (4 + 1 + 4 + 2)
    assert {point.setting.link for point in listed} == {"real"}
    assert {point.setting.threads for point in listed} == {1}
    prefills = [point.x for point in listed if point.measure == "prefill"]
    assert prefills == [256, 512, 1024, 2048] * 4
    assert {point.x for point in listed if point.measure == "timeline"} == {1024}
    assert {point.rounds for point in listed if point.measure == "mix"} == {3}


def test_quick_yields_to_what_is_said():
    assert {point.setting.shape for point in asked("--quick")} == {"llama-128x2"}
    assert [p.x for p in asked("--quick --prompts 8 --measures prefill timeline")] == [8, 8]


def test_one_gpu_has_no_link():
    listed = asked("--device cuda --ranks 1 --shapes llama-512x8")
    assert {point.measure for point in listed} == {"prefill", "decode", "mix"}  # a timeline shows the lanes of a CPU
    (setting,) = {point.setting for point in listed}
    assert (setting.link, setting.mbit_per_s, setting.device, setting.wire) == ("none", 0.0, "cuda", "unpaced")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--link real --device cuda", "use --link none"),
        ("--link paced --ranks 1", "use --link none"),
        ("--ranks 3", "must be even"),
        ("--mbit 0", "above 0"),
        ("--mbit nan", "above 0"),
        ("--prompts 0", "at least 1"),
        ("--rounds two", "whole number"),
        ("--shapes gpt", "invalid choice"),
    ],
)
def test_refusals(line, said, capsys):
    with pytest.raises(SystemExit) as error:
        parse(line.split())
    assert error.value.code == 2
    assert said in capsys.readouterr().err
