"""Hardware records: known ones, and a user's own file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tokenweave.cost.hardware import KNOWN, as_json, find_hardware


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize("known", KNOWN, ids=lambda hardware: hardware.name)
def test_a_known_record_is_found_and_survives_its_file(known, tmp_path):
    assert find_hardware(known.name) is known
    assert find_hardware(known.name.upper()) is known
    assert find_hardware(known) is known
    assert find_hardware(write(tmp_path / "own.json", as_json(known))) == known


def test_data_sheet_figures():
    h100 = find_hardware("h100-sxm")
    assert (h100.sms, h100.peak("bfloat16"), h100.memory_bandwidth) == (132, 989.4e12, 3.35e12)
    with pytest.raises(ValueError, match=r"a100 has no peak for 'float8'; it has bfloat16, float16, float32"):
        find_hardware("a100").peak("float8")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown hardware 'h100' \(did you mean 'h100-sxm'\?\); known: h100-sxm, h200"
    ):
        find_hardware("h100")
    with pytest.raises(ValueError, match=r"unknown hardware 'quantum'; known: .*, or a \.json file of your own"):
        find_hardware("quantum")


def test_a_file_states_what_differs_from_a_known_record(tmp_path):
    path = write(tmp_path / "slow.json", {"like": "h100-sxm", "name": "slow", "sms": 100, "efficiency": {"gemm": 0.5}})
    h100 = find_hardware("h100-sxm")
    expected = replace(h100, name="slow", sms=100, efficiency=replace(h100.efficiency, gemm=0.5))
    assert find_hardware(path) == expected
    assert find_hardware(str(path)) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object with the fields of a hardware record, got list"),
        ({"like": "h10"}, "unknown hardware 'h10'"),
        ({"name": "x", "sms": 3}, "flops, memory_bandwidth, memory_bytes, l2_bytes, link_bandwidth, multicast missing"),
        ({"like": "a100", "smss": 3}, "unknown field 'smss'; did you mean 'sms'?"),
        ({"like": "a100", "sms": 0}, "sms must be a whole number >= 1, got 0"),
        ({"like": "a100", "sms": True}, "sms must be a whole number >= 1, got True"),
        ({"like": "a100", "memory_bandwidth": -1}, "memory_bandwidth must be a number > 0, got -1"),
        ({"like": "a100", "memory_bandwidth": "fast"}, "memory_bandwidth must be a number > 0, got 'fast'"),
        ('{"like": "a100", "link_bandwidth": NaN}', "link_bandwidth must be a number > 0, got nan"),
        ({"like": "a100", "multicast": 1}, "multicast must be true or false, got 1"),
        ({"like": "a100", "flops": 3}, "flops must be an object"),
        ({"like": "a100", "flops": {"bfloat16": 0}}, "flops.bfloat16 must be a number > 0, got 0"),
        ({"like": "a100", "efficiency": {"gem": 1}}, "unknown field 'gem'; did you mean 'gemm'?"),
        ({"like": "a100", "communication_sms": [0]}, "communication_sms must be a whole number >= 1, got 0"),
        ({"like": "a100", "communication_sms": []}, "communication_sms must name at least one SM count"),
        ({"like": "a100", "tiles": [{"rows": 64}]}, "tile columns must be a whole number >= 1, got None"),
        ({"like": "a100", "step_s": -1}, "step_s must be a number >= 0, got -1"),
    ],
)
def test_a_broken_file_is_refused_by_name_with_what_is_wrong(values, message, tmp_path):
    path = write(tmp_path / "own.json", values)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        find_hardware(path)
    assert f"the hardware file {path} cannot be used: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        find_hardware(tmp_path / "none.json")
