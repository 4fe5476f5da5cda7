"""The command line: its points, defaults and refusals."""

import pytest

from perf.configs import config_of
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


def test_gpus_that_are_not_there(monkeypatch, capsys):
    from perf.overlap import __main__ as command

    monkeypatch.setattr(command.torch.cuda, "device_count", lambda: 1)
    assert command.main(["--device", "cuda", "--ranks", "2"]) == 2
    assert "needs 2 GPUs, torch sees 1; ranks that share one say nothing of time" in capsys.readouterr().err
    assert command.too_few(1, 1) == ""


def test_any_model_can_be_named(tmp_path):
    config_of("Qwen3-8B").save_pretrained(tmp_path)
    line = f"--measures decode --device cuda --ranks 8 --shapes llama-3.3-70b-instruct {tmp_path}"
    names = list(dict.fromkeys(point.setting.shape for point in asked(line)))
    assert names == ["Llama-3.3-70B", str(tmp_path)]
    assert {point.setting.name for point in asked(line)} == {"Llama-3.3-70B", tmp_path.name}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--link real --device cuda", "use --link none"),
        ("--link paced --ranks 1", "use --link none"),
        ("--ranks 65", "up to 64 ranks"),
        ("--mbit 0", "above 0"),
        ("--mbit nan", "above 0"),
        ("--prompts 0", "at least 1"),
        ("--rounds two", "whole number"),
        ("--shapes gpt", "unknown model 'gpt'"),
        ("--shapes lama-3.3-70b", "did you mean 'Llama-3.3-70B'"),
        ("--prompts 8192", "made for 4096 tokens"),
        ("--ranks 3", "3 ranks cannot share evenly"),
        ("--shapes ./nowhere", "does not exist"),
        ("--mixes trace", "invalid choice"),
    ],
)
def test_refusals(line, said, capsys):
    with pytest.raises(SystemExit) as error:
        parse(line.split())
    assert error.value.code == 2
    assert said in capsys.readouterr().err
