"""Figures and tables of a trace: what they show is what they were given, and nothing hangs on colour alone."""

import numpy as np
import pytest

from dsv3_jax.analysis import figures, routing, routing_figures
from dsv3_jax.analysis.specialisation import Information, Specialist
from dsv3_jax.parallel.traffic import Visits

RNG = np.random.default_rng(0)
NAMES = ["3", "4", "mtp 1"]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def information(bits, low, mean, high):
    return Information(bits, mean, np.array([low, mean, high]), 0.01)


def visited(nodes, ranks):
    none = np.zeros(len(nodes), int)
    return Visits(np.array(ranks, int), np.array(nodes, int), none, none, none, none)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: routing_figures.load_by_layer(RNG.integers(0, 9, (3, 40)), NAMES),
        lambda: routing_figures.load_by_domain(RNG.integers(0, 9, (3, 2, 8)), ["a", "b"], NAMES),
        lambda: routing_figures.information([information(0.1, 0.2, 0.1, 0.3)] * 3, NAMES),
        lambda: routing_figures.margin_curves(RNG.random((50, 3)), NAMES),
        lambda: routing_figures.margin_curves(np.full((5, 3), np.nan, np.float16), NAMES),
        lambda: routing_figures.lift_maps(RNG.random((3, 30, 30)), NAMES, "from", "to", "pairs"),
        lambda: routing_figures.lift_maps(np.full((1, 4, 4), np.nan), NAMES[:1], "from", "to", "pairs"),
        lambda: routing_figures.lift_maps(np.zeros((4, 2, 2)), ["a", "b", "c", "d"], "from", "to", "pairs"),
        lambda: routing_figures.visit_shares({name: visited([1, 2, 2], [1, 3, 4]) for name in NAMES}),
        lambda: routing_figures.visit_shares({"3": visited([], [])}),
        lambda: routing_figures.token_view(["word"] * 100, RNG.integers(0, 9, 100), 8, "text"),
        lambda: routing_figures.token_view([], np.zeros(0, int), 8, "text"),
        lambda: routing_figures.token_view(["a"], np.zeros(1, int), 1, "text"),
    ],
)
def test_figures_draw_without_a_warning_and_name_their_axes(draw, tmp_path):
    figure = draw()
    figures.save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    for ax in figure.axes:
        bar_or_text = ax.get_label() == "<colorbar>" or not len(ax.get_yticks())
        assert not ax.axison or (ax.get_xlabel() and ax.get_ylabel()) or (bar_or_text and (ax.get_xlabel() or ax.get_ylabel()))


def test_maps_of_load_show_it_relative_to_each_row_s_mean():
    load = np.array([[[3, 1], [1, 1]], [[0, 0], [0, 8]]])
    figure = routing_figures.load_by_domain(load, ["a", "b"], ["3", "4"])
    assert texts(figure.axes[0]) == ["1.5", "0.5", "1.0", "1.0"] and texts(figure.axes[1]) == ["0.0", "0.0", "0.0", "2.0"]
    assert [ax.get_title() for ax in figure.axes[:2]] == ["layer 3", "layer 4"]
    assert texts(routing_figures.load_by_layer(load[0], ["3", "4"]).axes[0]) == ["1.5", "0.5", "1.0", "1.0"]


def test_spread_has_both_ends_and_no_more_than_there_are():
    assert routing_figures.spread(58, 3) == [0, 28, 57] and routing_figures.spread(2, 3) == [0, 1]
    assert routing_figures.spread(1, 3) == [0] and routing_figures.spread(0, 3) == []


def test_the_balance_table_keeps_even_skewed_and_empty_layers_apart():
    load = np.array([[5, 5, 5, 5], [0, 0, 20, 0], [0, 0, 0, 0]])
    rows = [line.split() for line in routing_figures.balance_table(load, np.array([1.5, 0.25, np.nan]), NAMES).split("\n")]
    assert rows[1] == "3 0.000 0.000 0.000 2.00 bits 100.0 % 1.50 bits 0".split()
    assert rows[2] == "4 3.000 1.732 0.750 0.00 bits 0.0 % 0.25 bits 3".split()
    assert rows[3] == "mtp 1 nan nan nan nan bits nan % nan bits 4".split()


def test_tables_are_as_wide_as_they_need():
    assert routing_figures.table(("a", "bc"), [("long", "1"), ("x", "222")]) == "a      bc\nlong    1\nx     222"
    assert routing_figures.table(("a", "bc"), []) == "a  bc"


def test_information_stands_beside_the_range_of_chance():
    figure = routing_figures.information([information(0.5, 0.1, 0.2, 0.3), information(0.1, 0.1, 0.15, 0.4)], ["3", "4"])
    (ax,) = figure.axes
    (line,) = [line for line in ax.lines if line.get_label() == "measured"]
    assert line.get_ydata().tolist() == [0.5, 0.1] and [t.get_text() for t in ax.get_xticklabels()] == ["3", "4"]
    bars = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([[low[1], high[1]] for low, high in bars], [[0.1, 0.3], [0.1, 0.4]])


def test_the_list_of_specialists_says_how_many_it_leaves_out():
    found = [Specialist(e, 1, 1200, 2.5, 1e-4, 1e-3) for e in range(5)]
    table = routing_figures.specialist_table(found, {1: "code"}, "3", most=2).split("\n")
    assert table[0] == "layer 3 (the first 2 of 5)" and len(table) == 4
    assert table[2].split() == ["code", "0", "1,200", "2.50", "1.0e-04", "1.0e-03"]
    assert "no preference" in routing_figures.specialist_table([], {}, "3")


def test_margin_curves_are_the_share_of_tokens_below():
    margins = np.repeat([[1e-4, 0.5]], 4, axis=0)
    margins[:2] = 2e-2
    figure = routing_figures.margin_curves(margins, ["3", "4"])
    first, second = figure.axes[0].lines[:2]
    at = np.searchsorted(routing_figures.THRESHOLDS, 1e-3)
    assert first.get_ydata()[at] == 50 and second.get_ydata()[at] == 0
    assert first.get_ydata()[-1] == second.get_ydata()[-1] == 100
    assert first.get_linestyle() != second.get_linestyle() and first.get_marker() != second.get_marker()


def test_a_lift_of_one_is_the_middle_of_the_scale_and_every_cell_carries_its_number():
    lift = np.array([[[np.nan, 1.0], [0.0, 9.0]]])
    ax, *_ = routing_figures.lift_maps(lift, ["layer 3"], "from", "to", "pairs").axes
    assert texts(ax) == ["-", "1.0", "0.0", "9.0"] and (ax.get_xlabel(), ax.get_ylabel()) == ("to", "from")
    image = ax.images[0]
    assert image.norm(image.get_array()[0, 1]) == 0.5 and np.ma.is_masked(image.get_array()[0, 0])


def test_visits_are_shares_of_tokens_and_bars_differ_in_more_than_colour():
    figure = routing_figures.visit_shares({"3": visited([1, 2, 2, 4], [2, 2, 2, 2]), "4": visited([1], [1])})
    first, second = figure.axes[0].containers
    assert [bar.get_height() for bar in first] == [25, 50, 0, 25] and [bar.get_height() for bar in second] == [100]
    assert first[0].get_hatch() != second[0].get_hatch()


def test_the_traffic_table_has_the_bytes_of_the_trace():
    cluster = routing.Cluster(8, 1, 2)
    found = routing.trace_traffic(np.array([[0, 7], [2, 4]]), cluster, 100, np.array([0, 0]))
    *_, row = routing_figures.traffic_table({"3": found}).split("\n")
    # Token 0 stays once and crosses once, token 1 crosses twice: 1.5 copies of 100 numbers, to as many nodes.
    assert row.split() == "3 2 2 2 2 300 B/token 300 B/token 155 B/token".split()


def test_tokens_are_shown_with_their_expert_and_what_cannot_be_drawn_is_marked():
    labels = [" a\n", "$x$ $", "\u4e2d\x07", "w" * 40, "\t"]
    figure = routing_figures.token_view(labels, np.array([0, 7, 8, 3, 200]), 8, "text", width=30)
    shown = texts(figure.axes[0])
    assert shown[::2] == ["\u00b7a\u21b5", "$x$\u00b7$", "\u25a1\u25a1", "w" * 23 + "\u2026", "\u2192"]
    assert not any(text.get_parse_math() for text in figure.axes[0].texts)
    assert shown[1::2] == ["0", "7", "-", "3", "-"]  # from n_experts on there is none
    dark, bright, none = (patch.get_facecolor()[:3] for patch in figure.axes[0].patches[:3])
    assert sum(dark) < sum(bright) < sum(none) == 3


def test_boxes_of_tokens_do_not_overlap_and_stay_within_the_width():
    labels = ["x" * n for n in RNG.integers(1, 40, 60)]
    ax = routing_figures.token_view(labels, RNG.integers(0, 300, 60), 300, "text", width=30).axes[0]
    boxes = [patch.get_bbox() for patch in ax.patches]
    assert all(0 <= box.x0 < box.x1 <= 30 for box in boxes)
    for before, box in zip(boxes, boxes[1:], strict=False):
        assert (box.y0, box.x0) == (before.y0, before.x1) or (box.x0 == 0 and box.y0 == before.y0 + 1)


def test_labels_are_text_where_the_tokenizer_has_some_and_numbers_elsewhere():
    ids = np.array([0, 1, 2, 9])
    assert routing_figures.token_labels(ids, [b"", b"a", b"\xff"]) == ["[0]", "a", "\ufffd", "[9]"]
    assert routing_figures.token_labels(ids, None) == ["[0]", "[1]", "[2]", "[9]"]
