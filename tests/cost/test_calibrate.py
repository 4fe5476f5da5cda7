"""Calibrating: what is fitted is what was measured, and the file is whole or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from tokenweave.comm.group import Ranks
from tokenweave.comm.link import Link
from tokenweave.cost import calibrate as module
from tokenweave.cost.calibrate import Calibration, Point, calibrate, fit, fit_line, measure, predict, store
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.machine import calibrated, calibration_path, hardware_at_hand, hardware_key, with_link
from tokenweave.cost.store import read_json, write_json

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENWEAVE_CACHE", str(tmp_path))


def made_of(hardware, world_size=2):
    """Points as a machine of that record would measure them."""
    dtype = "bfloat16" if hardware.tiles else "float32"
    shapes = [("gemm", (rows, 4096, 4096), 2.0 * rows * 4096 * 4096) for rows in (256, 2048, 8192)]
    shapes += [("attention", (tokens, 32, 8, 128), 1e9) for tokens in (2048, 8192)]
    shapes += [("copy", (1 << 28,), 2.0 * (1 << 28)), ("launch", (), 1.0)]
    shapes += [(what, (size,), float(size)) for size in (1 << 16, 1 << 22) for what in ("all_reduce", "sharded_sum")]
    points = [Point(what, size, dtype, 1.0, amount) for what, size, amount in shapes]
    seconds = [predict(hardware, point, world_size) or 1e-3 for point in points]
    return [replace(point, seconds=each) for point, each in zip(points, seconds)]


@pytest.mark.parametrize("base", ["h100-sxm", "l40s"])
def test_a_gpus_shares_are_found_again(base):
    sheet = find_hardware(base)
    shares = replace(sheet.efficiency, gemm=0.5, attention=0.3, memory=0.7, ring_link=0.6)
    truth = replace(sheet, efficiency=shares, ring_s=40e-6)
    found = fit(sheet, made_of(truth), 2)
    assert (found.flops, found.memory_bandwidth, found.link_bandwidth) == (
        sheet.flops,
        sheet.memory_bandwidth,
        sheet.link_bandwidth,
    )
    for name in ("gemm", "attention", "memory", "ring_link"):
        assert getattr(found.efficiency, name) == pytest.approx(getattr(shares, name), rel=1e-3)
    assert found.ring_s == pytest.approx(40e-6, rel=1e-3)
    assert found.kernel_s == 1e-3


def test_a_cpus_peak_and_link_are_what_was_measured():
    sheet = find_hardware("cpu")
    truth = replace(sheet, flops={"float32": 1e11}, memory_bandwidth=2e10, link_bandwidth=1e9, ring_s=3e-4)
    truth = replace(truth, efficiency=replace(truth.efficiency, gemm=1.0, attention=0.4, memory=1.0, ring_link=1.0))
    points = made_of(truth)
    found = fit(sheet, points, 2)
    assert found.peak("float32") == pytest.approx(1e11)
    assert (found.memory_bandwidth, found.link_bandwidth) == pytest.approx((2e10, 1e9))
    assert found.ring_s == pytest.approx(3e-4)
    for point in points:
        said = predict(found, point, 2)
        assert said is None or said == pytest.approx(point.seconds, rel=1e-3)


def test_the_stated_fixed_part_is_less_than_any_sum_that_was_measured():
    truth = replace(find_hardware("cpu"), link_bandwidth=2e9, ring_s=1.3e-3)
    points = made_of(truth)
    hardware = fit(find_hardware("cpu"), points, 2)
    fixed_s = Calibration(hardware, tuple(points), (None,) * len(points), 2).sum_s
    smallest_s = min(point.seconds for point in points if point.what == "sharded_sum")
    assert 0.5 * smallest_s < fixed_s < smallest_s
    assert fixed_s == pytest.approx(2 * 1.3e-3 / 7, rel=0.01)  # two collectives; a record's figure is of eight ranks


def test_another_dtype_is_predicted_as_it_was_measured():
    cpu = find_hardware("cpu")
    gemms = [Point("gemm", (rows, 1024, 1024), "float32", rows * 2e-5, 2.0 * rows * 2**20) for rows in (256, 512, 1024)]
    slow = replace(gemms[0], seconds=gemms[0].seconds / 4)  # the best rate, by far
    other = Point("gemm", (256, 1024, 1024), "bfloat16", 1e-3, 2.0 * 256 * 2**20)
    assert predict(fit(cpu, [*gemms, slow, other], 1), other, 1) == pytest.approx(1e-3, rel=1e-3)


def test_poor_fits_are_listed_the_worst_first():
    points = [Point("copy", (size,), "uint8", seconds, 2.0 * size) for size, seconds in ((1, 1.0), (2, 1.0), (3, 1.0))]
    calibration = Calibration(find_hardware("cpu"), (*points, points[0]), (1.9, 2.1, 0.2, None))
    assert [(point.size, ratio) for point, ratio in calibration.poor] == [((3,), 0.2), ((2,), 2.1)]


def test_one_rank_leaves_the_link_as_it_was():
    sheet = find_hardware("cpu")
    points = [point for point in made_of(sheet) if "reduce" not in point.what and "sum" not in point.what]
    assert fit(sheet, points, 1).link_bandwidth == sheet.link_bandwidth


def test_a_line_is_never_negative():
    assert fit_line([1e3, 1e6], [2e-3, 1e-3]) == (pytest.approx(2e-3, rel=0.1), pytest.approx(1e-11))
    fixed_s, byte_s = fit_line([1e4, 1e5, 1e6], [1e-3 + 1e-9 * x for x in (1e4, 1e5, 1e6)])
    assert (fixed_s, byte_s) == pytest.approx((1e-3, 1e-9))


# -- on this machine ---------------------------------------------------------------------------------------------------

SMALL = {
    "rows": (16, 64),
    "gemms": ((64, 64),),
    "prompts": (32,),
    "heads": (2, 1, 16),
    "copy_bytes": (1 << 16,),
    "sum_bytes": (1 << 12, 1 << 14),
}


def calibrate_small() -> tuple[str, list[str], float]:
    """Runs on every rank."""
    from tokenweave.comm.group import join

    module.SIZES["cpu"], module.POINT_S = SMALL, 0.01
    ranks = join(CPU, 60.0)
    try:
        calibration = calibrate(ranks)
    finally:
        ranks.leave()
    return calibration.hardware.name, [p.what for p in calibration.points], calibration.hardware.link_bandwidth


def test_on_one_rank(monkeypatch):
    monkeypatch.setitem(module.SIZES, "cpu", SMALL)
    monkeypatch.setattr(module, "POINT_S", 0.01)
    seen: list[Point] = []
    calibration = calibrate(Ranks(0, 1, CPU, 60.0, None, None), seen.append)
    assert tuple(seen) == calibration.points
    assert {point.what for point in seen} == {"gemm", "attention", "copy", "launch"}
    assert all(point.seconds > 0 for point in seen)
    assert calibrated(CPU) is None
    path = store(calibration, CPU)
    assert path == calibration_path(CPU)
    assert calibrated(CPU) == calibration.hardware == find_hardware(path) == hardware_at_hand(CPU)


def test_on_two_ranks(ranks):
    (name, what, link), (other_name, _, other_link) = ranks(2).run(calibrate_small)
    assert what.count("sharded_sum") == what.count("all_reduce") == 2
    assert (name, link) == (other_name, other_link)
    assert name.endswith("threads")


def test_points_that_take_long_are_not_followed_by_longer_ones(monkeypatch):
    monkeypatch.setattr(module, "timed", lambda run, device, ranks=None: 2.0)
    monkeypatch.setitem(module.SIZES, "cpu", SMALL)
    points = list(measure(Ranks(0, 1, CPU, 60.0, None, None)))
    assert [point.size for point in points if point.what == "gemm"] == [(16, 64, 64), (256, 1024, 512)]


# -- files -------------------------------------------------------------------------------------------------------------


def test_without_a_calibration_the_data_sheet_counts():
    assert calibrated(CPU) is None
    assert hardware_at_hand(CPU) is find_hardware("cpu")


@pytest.mark.parametrize("text", ["", "{", '{"name": "x"}', "[]", '{"like": "cpu", "sms": 0}', "\0"])
def test_a_broken_calibration_is_refused_by_name(text):
    path = calibration_path(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        hardware_at_hand(CPU)
    assert str(path) in str(caught.value)
    assert "delete it and run `tokenweave calibrate` again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_that_could_not_be_read_is_not_written():
    broken = replace(find_hardware("cpu"), link_bandwidth=float("nan"))
    with pytest.raises(ValueError, match="link_bandwidth must be a number > 0"):
        store(Calibration(broken, (), ()), CPU)
    assert not calibration_path(CPU).exists()


def write_often(path, value):
    for _ in range(100):
        write_json(path, [value] * 2000)


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path):
    path = tmp_path / "shared.json"
    write_json(path, [0] * 2000)
    writers = [get_context("fork").Process(target=write_often, args=(path, value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    read = [read_json(path, list, "") for _ in range(100)]
    for writer in writers:
        writer.join(60)
    read.append(read_json(path, list, ""))
    assert all(values is not None and len(values) == 2000 and len(set(values)) == 1 for values in read)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())[0] in (1, 2)


def test_a_simulated_link_is_no_faster_than_the_real_one():
    cpu = replace(find_hardware("cpu"), link_bandwidth=2e9)
    slow = with_link(cpu, Link(1e8, 1e-3), 2)
    assert slow.link_bandwidth == 1e8
    assert slow.ring_s / 7 == pytest.approx(cpu.ring_s / 7 + 1e-3)
    assert with_link(cpu, Link(1e12), 2).link_bandwidth == 2e9 * cpu.efficiency.ring_link
    assert hardware_key(CPU, Link(1e8, 1e-3)) == f"{hardware_key(CPU)}-link-0.8-gbit-1000-us"
