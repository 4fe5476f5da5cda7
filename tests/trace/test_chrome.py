import json

import pytest

from tests.trace.simulator import Step, simulate
from tokenweave.trace import chrome
from tokenweave.trace.spans import LANES, Span

EPOCH_NS = 1_790_000_000_123_456_789  # wall-clock times, as Recorder.export gives them


@pytest.fixture
def spans():
    relative = simulate([Step((40, 24)), Step((2, 1), "decode"), Step((3,), "decode", inline=True)], layers=2)
    return [s._replace(start_ns=s.start_ns + EPOCH_NS, end_ns=s.end_ns + EPOCH_NS) for s in relative]


@pytest.fixture
def trace(spans, tmp_path):
    chrome.write(spans, tmp_path / "trace.json")
    return json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))


def complete(trace):
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_the_file_is_a_trace_of_metadata_and_complete_events(trace, spans):
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X"}
    assert len(complete(trace)) == len(spans)
    for event in complete(trace):
        assert {"name", "cat", "pid", "tid", "ts", "dur", "args"} <= event.keys()
        assert event["ts"] >= 0
        assert event["dur"] >= 0
    assert min(event["ts"] for event in complete(trace)) == 0


def test_every_rank_is_a_named_process_and_every_lane_a_named_thread_in_order(trace):
    named = {
        (event["pid"], event["tid"] if "thread" in event["name"] else None, event["name"]): event["args"]
        for event in trace["traceEvents"]
        if event["ph"] == "M"
    }
    tids = sorted({event["tid"] for event in complete(trace)})
    assert 0 not in tids
    for rank in range(2):
        assert named[rank, None, "process_name"] == {"name": f"rank {rank}"}
        assert named[rank, None, "process_sort_index"] == {"sort_index": rank}
        assert [named[rank, tid, "thread_name"]["name"] for tid in tids] == list(LANES)
        order = [named[rank, tid, "thread_sort_index"]["sort_index"] for tid in tids]
        assert order == sorted(set(order))


def test_the_spans_can_be_read_back_to_the_nanosecond(trace, spans):
    lanes = {
        event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"
    }  # the same for all ranks
    origin_ns = min(span.start_ns for span in spans)

    def read(event):
        args = event["args"]
        kind = event["cat"].split(",")[0]
        start_ns = origin_ns + round(event["ts"] * 1000)
        return Span(
            event["pid"], args["step"], lanes[event["tid"]], kind, "AB".index(args["half"]),
            event["name"].split(".")[1].split()[0], start_ns, start_ns + round(event["dur"] * 1000),
            args["tokens"], args["bytes"], args["phase"],
        )  # fmt: skip

    assert sorted(map(read, complete(trace))) == sorted(spans)
    assert all(event["args"]["duration_us"] == event["dur"] for event in complete(trace))


def test_events_of_a_lane_do_not_overlap(trace):
    """Viewers drop or misplace events that overlap without nesting."""
    for track in {(event["pid"], event["tid"]) for event in complete(trace)}:
        events = [event for event in complete(trace) if (event["pid"], event["tid"]) == track]
        ends = [round((event["ts"] + event["dur"]) * 1000) for event in events]
        starts = [round(event["ts"] * 1000) for event in events]
        assert all(end <= start for end, start in zip(ends, starts[1:]))


def test_halves_and_waits_are_told_apart_by_name_category_and_colour(trace):
    looks = {}
    for event in complete(trace):
        kind = event["cat"].split(",")[0]
        looks.setdefault((event["args"]["half"], kind == "wait"), set()).add(event["cname"])
        assert event["name"].startswith(event["args"]["half"] + ".")
        assert event["cat"] == f"{kind},half {event['args']['half']}"
    assert all(len(colours) == 1 for colours in looks.values())
    assert looks["A", False] != looks["B", False]
    assert looks["A", True] == looks["B", True]
    assert {"A.attn", "B.mlp sum", "A.head gather", "B.attn wait"} <= {event["name"] for event in complete(trace)}


def test_no_spans_make_a_valid_empty_trace(tmp_path):
    chrome.write([], tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []


def test_names_are_escaped(tmp_path):
    chrome.write([Span(0, 0, "compute", "segment", 0, 'a "name" µ\n', 0, 5)], tmp_path / "trace.json")
    (event,) = complete(json.loads((tmp_path / "trace.json").read_text(encoding="utf-8")))
    assert event["name"] == 'A.a "name" µ\n'
