"""What the host does in a step, measured: that it can be, on any machine."""

import json

from perf import host


def test_a_table_of_parts(tmp_path, capsys):
    figures = tmp_path / "host.json"
    few = ["--rows", "1", "9", "--context", "40", "--rounds", "1", "--steps", "2", "--ranks", "2"]
    host.main([*few, "--json", str(figures)])
    assert capsys.readouterr().out.startswith("| us of a step | 1 rows | 9 rows |")
    found = json.loads(figures.read_text())["us"]
    assert set(found) == {"1", "9"}
    for us in found.values():
        assert set(us) == {*host.PARTS, "unpack", "bytes"}
        assert all(value > 0 for value in us.values())


def test_a_part_is_without_the_parts_inside_it():
    clock, now_s = host.Clock(), iter([0.0, 1.0, 3.0, 10.0])
    inner = clock.timed("inner", lambda: None)
    outer = clock.timed("outer", lambda: inner())
    with host.mock.patch.object(host.time, "perf_counter", lambda: next(now_s)):
        outer()
    assert clock.steps == [{"inner": 2.0, "outer": 8.0}]
