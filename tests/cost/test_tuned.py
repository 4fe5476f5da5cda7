"""Stored plans: looked up, scaled, whole or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from tokenweave.cost.choice import Choice
from tokenweave.cost.journal import Journal
from tokenweave.cost.shape import read_shape
from tokenweave.cost.tuned import Measurement, Store, Tuned, TunedLimits, TunedStep, make_key, scaled

SHAPE = read_shape(LlamaConfig(num_hidden_layers=4))
KEY = make_key(SHAPE, 4, "h100")
OFF, FUSED = Choice("off"), Choice("fused")


def woven(cut, sms=8):
    return Choice("weave", cut, sms, sms)


def step(rows, choice, unsplit="fused"):
    return TunedStep(rows, choice, 0.5, unsplit, 0.75, (Measurement(rows, choice, 0.5), Measurement(rows, OFF, 1.0)))


STEPS = (step(256, FUSED), step(1024, woven(640)), step(2048, woven(1024)))
TUNED = Tuned(KEY, STEPS, TunedLimits(600, 2048))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "tuned")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (0, None),
        (1, None),
        (127, None),
        (128, FUSED),
        (300, FUSED),
        (599, FUSED),  # nearer to the woven step, but below the threshold
        (600, woven(384)),  # nearer to the woven step, and above it
        (1024, woven(640)),
        (1200, woven(768)),
        (2048, woven(1024)),
        (5000, woven(2560)),  # more than was ever tuned
    ],
)
def test_lookup(rows, expected):
    assert TUNED.lookup(rows) == expected


def test_lookup_where_splitting_never_pays_and_without_limits():
    assert replace(TUNED, limits=TunedLimits(None, 64)).lookup(1024) == FUSED
    assert replace(TUNED, limits=None).lookup(1024) == woven(640)
    assert Tuned(KEY, ()).lookup(64) is None


@given(cut=st.integers(1, 4095), rows=st.integers(2, 10000))
@settings(deadline=None, derandomize=True)
def test_a_scaled_cut_leaves_rows_on_both_sides(cut, rows):
    choice = scaled(woven(cut), 4096, rows)
    assert 0 < choice.cut < rows
    assert abs(choice.cut - cut * rows / 4096) <= 64 or rows < 256


def test_what_is_stored_is_read_again(store):
    assert store.read(KEY) is None
    assert store.nearest(KEY) is None
    for one in STEPS:
        store.write_step(KEY, one)
    assert store.read(KEY) == replace(TUNED, limits=None)
    store.write_limits(KEY, TUNED.limits)
    assert store.read(KEY) == TUNED == Store(store.folder).nearest(KEY)
    assert store.lookup(KEY, 1024) == woven(640)
    assert store.lookup(make_key(SHAPE, 2, "h100"), 1024) is None


def test_keys_differ_by_every_size():
    other = replace(SHAPE, vocab_size=SHAPE.vocab_size + 1)
    keys = {KEY, make_key(other, 4, "h100"), make_key(SHAPE, 2, "h100"), make_key(SHAPE, 4, "h200")}
    assert len({key.folder for key in keys}) == 4
    assert make_key(read_shape(LlamaConfig(num_hidden_layers=4)), 4, "h100") == KEY
    assert make_key(replace(SHAPE, max_len=77), 4, "h100") == KEY  # a length is no size


def test_the_spread_is_that_of_repeats():
    one, two = Choice("weave", 64, 4, 4), Choice("weave", 128, 4, 4)

    def spread(*measured):
        return TunedStep(256, one, 1.0, "off", 2.0, tuple(Measurement(256, *each) for each in measured)).spread

    assert spread() == spread((one, 1.0)) == spread((one, 1.0), (two, 9.0)) == spread((one, 2.0), (one, 2.0)) == 0.0
    assert spread((one, 1.0), (one, 1.02), (two, 9.0)) == pytest.approx(0.014, rel=0.01)
    assert spread((one, 1.0), (one, 1.02), (two, 9.0), (two, 9.18)) == pytest.approx(0.014, rel=0.01)


def test_the_nearest_is_of_the_same_machine_and_the_most_alike(store):
    deeper = read_shape(LlamaConfig(num_hidden_layers=8))
    much_deeper = read_shape(LlamaConfig(num_hidden_layers=64))
    for shape, machine in ((deeper, "h100"), (much_deeper, "h100"), (SHAPE, "h200")):
        store.write_step(make_key(shape, 4, machine), STEPS[0])
    assert store.nearest(KEY).key == make_key(deeper, 4, "h100")
    assert store.nearest(make_key(SHAPE, 8, "h200")).key == make_key(SHAPE, 4, "h200")
    assert store.nearest(make_key(SHAPE, 8, "a100")) is None


def change(*path, to):
    def edit(values):
        for name in path[:-1]:
            values = values[name]
        values[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("version", to=2), 'expected an object with "version": 1'),
        (change("step", to=[]), "'step' must be an object, got []"),
        (change("step", "rows", to=0), "rows must be a whole number >= 1, got 0"),
        (change("step", "seconds", to=-1), "seconds must be a number > 0, got -1"),
        (change("step", "unsplit", to="weave"), "unsplit must be off or fused, got 'weave'"),
        (change("step", "extra", to=1), "step must be an object with"),
        (change("step", "choice", "mode", to="knit"), "mode must be one of off, fused, weave, nocomm, got 'knit'"),
        (change("step", "choice", "cut", to=1024), "a cut must leave rows on both sides of 1024, got 1024"),
        (change("step", "choice", "attention_sms", to=None), "mode 'weave' needs cut, attention_sms and mlp_sms"),
        (change("step", "measured", to={}), "measured must be a list"),
        (change("key", "world_size", to="4"), "world_size must be a whole number >= 1, got '4'"),
    ],
)
def test_a_broken_file_is_refused_by_name(store, edit, message):
    path = store.write_step(KEY, STEPS[1])
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        store.read(KEY)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "delete it and run `tokenweave tune` again" in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_half_a_file_is_refused_by_name(store, share):
    path = store.write_limits(KEY, TUNED.limits)
    store.write_step(KEY, STEPS[0])
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(ValueError, match=str(path)):
        store.read(KEY)


def test_a_plan_of_another_model_is_refused(store):
    path = store.write_step(KEY, STEPS[0])
    other = make_key(SHAPE, 2, "h100")
    (store.folder / other.folder).mkdir(parents=True)
    path.rename(store.folder / other.folder / path.name)
    with pytest.raises(ValueError, match="is of Key"):
        store.read(other)


def write_all(folder, seconds):
    for _ in range(20):
        for one in STEPS:
            Store(folder).write_step(KEY, replace(one, seconds=seconds))


def test_writers_at_the_same_time(store):
    write_all(store.folder, 9.0)
    writers = [get_context("fork").Process(target=write_all, args=(store.folder, s)) for s in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    for _ in range(30):
        assert [one.rows for one in store.read(KEY).steps] == [256, 1024, 2048]
    for writer in writers:
        writer.join(60)
    assert {one.seconds for one in store.read(KEY).steps} <= {1.0, 2.0}


# -- the journal -------------------------------------------------------------------------------------------------------

ABOUT = {"version": 1, "seed": 0}


def never():
    raise AssertionError("measured again")


def begin(path, *seconds):
    journal = Journal(path, ABOUT)
    for each in seconds:
        journal.measured(64, OFF, lambda each=each: each)
    return journal


def test_a_journal_gives_back_what_was_measured_each_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    begin(path, 1.0, 2.0).close()
    journal = Journal(path, ABOUT)
    assert journal.known == 2
    assert [journal.measured(64, OFF, never) for _ in range(2)] == [1.0, 2.0]
    assert journal.measured(64, OFF, lambda: 3.0) == 3.0
    assert journal.measured(64, woven(32), lambda: 4.0) == 4.0
    journal.close()
    assert Journal(path, ABOUT).known == 4


def test_what_a_kill_leaves_of_a_line_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    begin(path, 1.0, 2.0).close()
    path.write_bytes(path.read_bytes()[:-5])
    journal = Journal(path, ABOUT)
    assert journal.known == 1
    journal.measured(64, FUSED, lambda: 5.0)
    journal.close()
    assert Journal(path, ABOUT).known == 2


def test_a_journal_of_another_run_is_begun_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    begin(path, 1.0).close()
    journal = Journal(path, ABOUT | {"seed": 1})
    assert journal.known == 0
    journal.close(done=True)
    assert not path.exists()


@pytest.mark.parametrize("line", ["nonsense", '{"rows": 64}', '{"rows": 64, "choice": {}, "seconds": 1}'])
def test_a_broken_journal_is_refused_by_name(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps(ABOUT) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"the journal {path} cannot be used: .*; delete it to begin anew"):
        Journal(path, ABOUT)


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = begin(path, 1.0)
    with pytest.raises(ValueError, match="is in use by another `tokenweave tune`"):
        Journal(path, ABOUT)
    journal.close()
    Journal(path, ABOUT).close()
