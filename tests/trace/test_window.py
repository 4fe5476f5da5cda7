import pytest

from tests.trace.simulator import Step, simulate
from tokenweave.trace.spans import Span
from tokenweave.trace.window import MAX_LAYERS, ZOOM_LAYERS, clip, extent, half_tokens, telling_step, zoom


def test_the_step_with_the_most_tokens_is_the_telling_one():
    spans = simulate([Step((2, 2), "decode"), Step((100, 60)), Step((161,)), Step((3, 2), "decode")], layers=1)
    assert telling_step(spans) == 2


def test_of_equals_the_most_split_then_the_last():
    assert telling_step(simulate([Step((32, 32)), Step((64,)), Step((64,))], layers=1)) == 0
    assert telling_step(simulate([Step((32, 32)), Step((32, 32)), Step((64,))], layers=1)) == 1


def test_tokens_of_a_half_are_those_before_rows_drop_out():
    assert half_tokens(simulate([Step((100, 60))], layers=2)) == [100, 60]


@pytest.mark.parametrize("layers", [0, 1, MAX_LAYERS])
def test_a_short_step_is_not_zoomed(layers):
    assert zoom(simulate([Step((32, 32))], layers=layers)) is None


@pytest.mark.parametrize("layers", [MAX_LAYERS + 1, 8, 32, 33])
@pytest.mark.parametrize("tokens", [(512, 512), (1024,)])
def test_the_zoom_shows_whole_layers_from_the_middle(layers, tokens):
    spans = simulate([Step(tokens)], layers=layers)
    start_ns, end_ns = zoom(spans)
    mine = [s for s in spans if s.kind == "segment" and s.half == 0 and s.rank == 0]
    inside = [s.name for s in mine if start_ns <= s.start_ns < end_ns]
    assert inside == ["attn", "mlp"] * ZOOM_LAYERS
    before = sum(s.end_ns <= start_ns for s in mine)
    after = sum(s.start_ns >= end_ns for s in mine)
    assert abs(before - after) <= 4


def test_the_zoom_does_not_depend_on_names():
    spans = [Span(0, 0, "compute", "segment", 0, "", i * 10, i * 10 + 9) for i in range(MAX_LAYERS + 1)]
    assert zoom(spans) == (20, 50)
    assert zoom([s._replace(kind="sum") for s in spans]) is None


def test_clip_cuts_at_the_edges_and_drops_what_only_touches():
    spans = [Span(0, 0, "comm", "sum", 0, "attn", *times) for times in [(0, 10), (5, 15), (12, 30), (20, 40), (0, 99)]]
    assert [s[6:8] for s in clip(spans, (10, 20))] == [(10, 15), (12, 20), (10, 20)]


def test_the_extent_is_never_empty():
    assert extent([Span(0, 0, "comm", "sum", 0, "attn", 5, 5)]) == (5, 6)
