"""The journal: what it gives back, after a kill too, and for which code."""

from dataclasses import replace

from perf.overlap.journal import Journal, digest
from perf.overlap.points import Point, Setting, by_setting

POINT = Point(Setting("llama-512x8", "real", 1000.0), "prefill", 1024, 5)


def test_reads_back_what_was_appended(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.read() == {}
    journal.append("a", {"seconds": {"off": [1.0]}})
    journal.append("b", {"seconds": {}})
    journal.append("a", {"seconds": {"off": [2.0]}})
    assert journal.read() == {"a": {"seconds": {"off": [2.0]}}, "b": {"seconds": {}}}


def test_a_line_cut_short_by_a_kill_does_not_count(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("a", {"x": 1})
    journal.append("b", {"x": 2})
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-5])
    assert journal.read() == {"a": {"x": 1}}
    journal.append("c", {"x": 3})
    assert journal.read() == {"a": {"x": 1}, "c": {"x": 3}}


def test_keys_differ_wherever_the_measurement_does():
    setting = POINT.setting
    changes = {
        "shape": "llama-1024x8",
        "link": "paced",
        "mbit_per_s": 500.0,
        "ranks": 4,
        "threads": 2,
        "device": "cuda",
    }
    others = [replace(POINT, setting=replace(setting, **{name: value})) for name, value in changes.items()]
    others += [
        replace(POINT, **change)
        for change in ({"measure": "decode"}, {"x": 512}, {"rounds": 7}, {"chunk_tokens": 512}, {"requests": 3})
    ]
    keys = [POINT.key("code"), POINT.key("other code"), *(other.key("code") for other in others)]
    assert len(set(keys)) == len(keys)
    assert replace(POINT).key("code") == keys[0]


def test_points_of_one_setting_share_their_ranks():
    other = replace(POINT, setting=replace(POINT.setting, mbit_per_s=500.0))
    longer = replace(POINT, x=2048)
    assert by_setting([POINT, other, longer]) == {POINT.setting: [POINT, longer], other.setting: [other]}


def test_the_digest_changes_with_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = digest([tmp_path])
    (tmp_path / "notes.txt").write_text("not code")
    assert digest([tmp_path]) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    second = digest([tmp_path])
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, digest([tmp_path])}) == 3
