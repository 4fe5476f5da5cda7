import struct

import pytest
from matplotlib import _pylab_helpers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_rgba

from tests.trace.simulator import Step, simulate
from tokenweave.trace import overlap
from tokenweave.trace.caption import MAX_TITLE, describe_steps, duration, title_line
from tokenweave.trace.panel import EXPOSED, IDLE, half_colours
from tokenweave.trace.picture import DPI, draw, figure
from tokenweave.trace.window import clip, extent, zoom

CASES = {
    "woven": lambda: simulate([Step((512, 512)), Step((2, 2), "decode")], layers=8),
    "off": lambda: simulate([Step((1024,), inline=True)], layers=8),
    "fused": lambda: simulate([Step((1024,))], layers=3),
    "eight ranks": lambda: simulate([Step((2048, 2048))], world_size=8, layers=32),
    "decode": lambda: simulate([Step((2, 2), "decode")] * 3, layers=4),
    "exposed": lambda: simulate([Step((700, 324))], layers=12, communication_share=3),
    "one rank": lambda: [s for s in simulate([Step((40,))], world_size=1, layers=2) if s.kind == "segment"],
    "four strands": lambda: simulate([Step((64,) * 4)], layers=5),
}


@pytest.fixture(params=CASES)
def spans(request):
    return CASES[request.param]()


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def bars(ax):
    """Bars by gid, as (start, width) in ms or us from the step's start."""
    found = {}
    for collection in ax.collections:
        boxes = [path.get_extents() for path in collection.get_paths()]
        found[collection.get_gid()] = [(box.x0, box.width) for box in boxes]
    return found


def bar_counts(ax, rank, lane):
    return {gid.rsplit(" ", 1)[1]: len(b) for gid, b in bars(ax).items() if gid.startswith(f"rank {rank} {lane} #")}


def texts(fig):
    return [t for holder in (fig, *fig.axes) for t in holder.texts]


def tick_labels(ax):
    """Those that are drawn: matplotlib keeps one beyond either end."""
    left, right = ax.get_xlim()
    drawn = [label for tick, label in zip(ax.get_xticks(), ax.get_xticklabels()) if left <= tick <= right]
    return drawn + ax.get_yticklabels()


def everything_said(fig):
    return " | ".join(text.get_text() for text in texts(fig))


@pytest.mark.parametrize("case", ["woven", "one rank"])
def test_the_file_is_a_png_of_the_figures_size(case, tmp_path):
    spans = CASES[case]()
    draw(spans, tmp_path / "timeline.png", title="a model")
    fig = figure(spans, title="a model")
    width, height = png_size(tmp_path / "timeline.png")
    assert width == 1800
    assert (width, height) == tuple(round(inches * DPI) for inches in fig.get_size_inches())


def test_the_size_depends_on_ranks_and_panels_only(tmp_path):
    for i, (tokens, layers) in enumerate([((512, 512), 8), ((900,), 7)]):
        draw(simulate([Step(tokens)], layers=layers, seed=i), tmp_path / f"{i}.png", title="x" * i)
    assert len({png_size(tmp_path / f"{i}.png") for i in range(2)}) == 1


def test_the_same_spans_make_the_same_bytes(tmp_path):
    for name in ("one.png", "other.png"):
        draw(CASES["fused"](), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_pyplot_knows_nothing_of_the_figure(tmp_path):
    before = list(_pylab_helpers.Gcf.figs)
    draw(CASES["one rank"](), tmp_path / "timeline.png")
    assert list(_pylab_helpers.Gcf.figs) == before


def test_every_rank_has_two_labelled_rows(spans):
    ranks = sorted({s.rank for s in spans})
    for ax in figure(spans).axes:
        labels = [label.get_text() for label in ax.get_yticklabels()]
        assert labels == [f"rank {rank} {lane}" for rank in ranks for lane in ("compute", "comm")]
        assert list(ax.get_yticks()) == sorted(set(ax.get_yticks()))


@pytest.mark.parametrize(("layers", "panels"), [(6, 1), (7, 2)])
def test_a_long_step_gets_a_second_panel(layers, panels):
    assert len(figure(simulate([Step((64, 64))], layers=layers)).axes) == panels


def test_a_woven_step_has_a_bar_for_every_span_in_its_halfs_colour():
    layers = 8
    spans = CASES["woven"]()
    whole, close = figure(spans).axes
    sites = 2 * layers + 2
    for rank in range(2):
        compute = {half_colours(half).compute: sites for half in range(2)}
        assert bar_counts(whole, rank, "compute") == compute | {IDLE: 2 * sites}
        assert bar_counts(whole, rank, "comm") == {half_colours(half).communication: sites for half in range(2)}
    assert bar_counts(close, 0, "compute")[half_colours(0).compute] == 6
    assert bar_counts(close, 0, "compute")[half_colours(1).compute] == 6


def test_red_marks_lie_exactly_where_communication_is_exposed():
    spans = [s for s in CASES["exposed"]() if s.step == 0]
    whole, close = figure(spans).axes
    start_ns, _ = extent(spans)
    for ax, window in ((whole, extent(spans)), (close, zoom(spans))):
        for rank in range(2):
            expected = overlap.exposed(clip([s for s in spans if s.rank == rank], window))
            marks = bars(ax)[f"rank {rank} exposed"]
            assert len(expected) == len(marks) > 0
            for (start, width), (start_mark_ns, end_mark_ns) in zip(marks, expected):
                assert start == pytest.approx((start_mark_ns - start_ns) / 1e6)
                assert width == pytest.approx((end_mark_ns - start_mark_ns) / 1e6)
    (marks,) = [c for c in close.collections if c.get_gid() == "rank 0 exposed"]
    assert same_color(marks.get_facecolor()[0], to_rgba(EXPOSED))
    assert marks.get_hatch()


def test_inline_sums_stand_red_on_the_compute_lane_and_the_comm_lane_is_empty():
    whole, close = figure(CASES["off"]()).axes
    for ax, count in ((whole, 18), (close, 6)):
        for rank in range(2):
            assert bar_counts(ax, rank, "comm") == {}
            assert bar_counts(ax, rank, "compute")[half_colours(0).communication] == count
            assert len(bars(ax)[f"rank {rank} exposed"]) == count
    assert "attn sum" in everything_said(figure(CASES["off"]()))


def test_the_headline_says_share_step_and_tokens():
    fig = figure(CASES["woven"](), title="my model")
    share = overlap.summary([s for s in CASES["woven"]() if s.step == 0]).hidden_share
    said = everything_said(fig)
    assert "my model" in said
    assert f"{share:.0%}" in said
    assert "step 0 (prefill)" in said
    assert "1024 tokens in 2 halves (512 + 512)" in said


def test_without_communication_there_is_nothing_red():
    fig = figure(CASES["one rank"]())
    assert "no communication" in everything_said(fig)
    assert not [gid for gid in bars(fig.axes[0]) if "exposed" in gid]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["half A compute"]


def test_a_window_is_shown_as_asked_even_across_steps():
    spans = simulate([Step((2, 2), "decode")] * 3, layers=2)
    window = (max(s.end_ns for s in spans if s.step == 0), extent(spans)[1])
    fig = figure(spans, window=window)
    (ax,) = fig.axes
    assert ax.get_xlim() == pytest.approx((0, (window[1] - window[0]) / 1e3))
    assert ax.xaxis.get_major_formatter()(100) == "100 µs"
    assert "steps 1 to 2 (decode)  ·  8 tokens, split" in everything_said(fig)


def test_a_crowded_window_is_drawn_without_names():
    spans = simulate([Step((8, 8), "decode")] * 12, layers=8, world_size=1)
    (ax,) = figure(spans, window=extent(spans)).axes
    assert not ax.texts
    assert sum(len(b) for gid, b in bars(ax).items() if "exposed" not in gid) == len(spans)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="there are no spans to draw"):
        figure([])
    spans = CASES["decode"]()
    for window in [(0, 1), (2_000_000, 1_500_000)]:
        with pytest.raises(ValueError, match="no span lies in the window"):
            figure(spans, window=window)


def test_no_text_leaves_the_picture_or_covers_another(spans):
    fig = figure(
        spans, title="A title as long as people make them, with the model, the ranks, and the (simulated) link"
    )
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    said = [*texts(fig), *fig.legends[0].get_texts(), *(label for ax in fig.axes for label in tick_labels(ax))]
    boxes = [(text.get_text(), text.get_window_extent()) for text in said]
    width, height = canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text
    for i, (text, box) in enumerate(boxes):
        for other, other_box in boxes[i + 1 :]:
            assert not box.overlaps(other_box), f"{text!r} covers {other!r}"


def test_names_fit_into_their_bars():
    fig = figure(CASES["decode"]())
    FigureCanvasAgg(fig).draw()
    (ax,) = fig.axes
    boxes = [path.get_extents(ax.transData) for c in ax.collections for path in c.get_paths()]
    assert ax.texts
    for text in ax.texts:
        box = text.get_window_extent()
        middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        holders = [b for b in boxes if b.contains(*middle)]
        assert any(b.x0 <= box.x0 and box.x1 <= b.x1 and b.y0 <= box.y0 and box.y1 <= b.y1 for b in holders), text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (5e-7, "500 ns"),
        (1e-6, "1.00 µs"),
        (23e-3, "23.0 ms"),
        (0.40912, "409 ms"),
        (0.9996, "1.00 s"),
        (75, "75.0 s"),
    ],
)
def test_durations_have_three_digits(seconds, text):
    assert duration(seconds) == text


def test_titles_are_made_safe():
    assert title_line("") == title_line(" \n") == "Timeline"
    assert title_line("two\nlines") == "two lines"
    assert len(title_line("x" * 500)) == MAX_TITLE
    fig = figure(CASES["one rank"](), title="costs $1 and $2_x")
    FigureCanvasAgg(fig).draw()  # a formula would fail here


def test_a_single_half_is_not_called_split():
    assert describe_steps(CASES["one rank"]()).startswith("step 0 (prefill)  ·  40 tokens, not split  ·  1 rank  ·  ")
