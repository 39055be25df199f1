"""Figures of flips: what they show is what they were given, and nothing hangs on colour alone."""

import io

import numpy as np
import pytest

from dsv3_jax.analysis import flip_figures
from dsv3_jax.analysis.flips import EDGES, Depth, Rate, ties_by_rounding

RNG = np.random.default_rng(0)
LAYERS = ["3", "4", "mtp 1"]


def rate(hits, of):
    return Rate(np.array(hits), np.array(of))


def bins(share=0.5, of=100):
    return rate([int(of * share)] * len(EDGES), [of] * len(EDGES))


def depth(n=3):
    none_before = rate([0] + [5] * (n - 1), [0] + [50] * (n - 1))
    return Depth(np.linspace(0.1, 0.5, n), np.linspace(0.1, 0.6, n), none_before, rate([9] * n, [100] * n))


FLIPS = {"BF16": rate([1, 2, 0], [100, 100, 100]), "FP8": rate([20, 30, 40], [100, 100, 100])}
KEPT = {"BF16": np.array([0.9, 0.8, 1.0]), "FP8": np.array([0.5, np.nan, 0.6])}
DRAWN = {
    "layers": lambda: flip_figures.by_layer(FLIPS, KEPT, LAYERS),
    "many layers": lambda: flip_figures.by_layer(
        {"BF16": rate([1] * 62, [9] * 62)}, {"BF16": np.ones(62)}, [str(i) for i in range(62)]
    ),
    "nothing counted": lambda: flip_figures.by_layer({"a": rate([0], [0])}, {"a": np.array([np.nan])}, ["3"]),
    "margins": lambda: flip_figures.by_margin({"a": bins(), "b": bins(0.1)}, {"a": bins(0.4)}, {"a": np.full(len(EDGES), 0.5)}),
    "margins alone": lambda: flip_figures.by_margin({"a": bins(0, 0)}, {}, {}),
    "rounding": lambda: flip_figures.by_rounding(RNG.random((50, 3)), LAYERS),
    "rounding nothing": lambda: flip_figures.by_rounding(np.full((5, 1), np.nan, np.float16), LAYERS[:1]),
    "ranks": lambda: flip_figures.by_rank({"a": RNG.integers(0, 9, (3, 8)), "b": np.zeros((3, 8), int)}),
    "gates": lambda: flip_figures.gate_moves({"a": RNG.random(9), "b": np.zeros(0)}, {"a": np.zeros(0), "b": RNG.random(3)}),
    "domains": lambda: flip_figures.by_domain({"a": rate([3, 0], [10, 0])}, ["x", "y"]),
    "depth": lambda: flip_figures.with_depth({"a": depth(), "b": depth()}, LAYERS),
    "one layer": lambda: flip_figures.with_depth({"a": depth(1)}, LAYERS[:1]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_draw_without_a_warning_and_name_their_axes(name):
    figure = DRAWN[name]()
    figure.savefig(io.BytesIO(), dpi=40)
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)


def shown(container):
    """(x, y, low, high) of each point of an error bar."""
    line, _, (bars,) = container.lines
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    return [(x, y, *end) for x, y, end in zip(*line.get_data(), ends, strict=True)]


def test_flips_by_layer_are_percent_with_their_intervals():
    left, right = DRAWN["layers"]().axes
    assert [c.get_label() for c in left.containers] == ["BF16", "FP8"]
    for container, counted in zip(left.containers, FLIPS.values(), strict=True):
        low, high = counted.interval()
        found = np.array(shown(container))
        np.testing.assert_allclose(found[:, 1:].T, 100 * np.array([counted.share, low, high]), atol=1e-9)
        assert (abs(found[:, 0] - np.arange(3)) < 0.2).all()
    assert left.containers[0].lines[0].get_marker() != left.containers[1].lines[0].get_marker()
    assert right.lines[0].get_ydata().tolist() == [90, 80, 100]
    assert [t.get_text() for t in left.get_xticklabels()] == LAYERS


def test_flips_by_margin_leave_out_bins_of_few_tokens_and_keep_to_their_bin():
    hits, of = np.zeros(len(EDGES), int), np.zeros(len(EDGES), int)
    of[2:5], hits[2:5] = [flip_figures.LEAST - 1, 40, 400], [20, 10, 40]
    predicted = np.linspace(0, 1, len(EDGES))
    figure = flip_figures.by_margin({"a": Rate(hits, of)}, {"a": Rate(hits, of)}, {"a": predicted})
    left, right = figure.axes
    full, hollow = left.containers
    for i, (x, y, _, _) in zip((3, 4), shown(full), strict=True):
        assert EDGES[i] < x < EDGES[i + 1] and y == pytest.approx(100 * hits[i] / of[i])
    assert hollow.lines[0].get_markerfacecolor() == "white" != full.lines[0].get_markerfacecolor()
    np.testing.assert_allclose(left.lines[0].get_ydata(), 100 * predicted[3:5])
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in right.patches]
    np.testing.assert_allclose(bars[4], [EDGES[4], EDGES[5], 400])


def test_what_rounding_flips_is_in_percent_beside_the_steps_of_formats():
    margins = RNG.random((400, 2)) * 0.01
    figure = flip_figures.by_rounding(margins, LAYERS[:2])
    (ax,) = figure.axes
    at = flip_figures.STEPS.tolist().index(2.0**-8)
    for i in range(2):
        assert ax.lines[i].get_ydata()[at] == pytest.approx(100 * ties_by_rounding(margins[:, i], [2.0**-8])[0])
    marks = {text.get_text(): line.get_xdata()[0] for text, line in zip(ax.texts, ax.lines[2:], strict=True)}
    assert marks == {"E4M3": 1 / 16, "BF16": 1 / 256, "FP16": 1 / 2048}


def test_ranks_are_shares_of_what_was_lost_in_all_layers():
    (ax,) = flip_figures.by_rank({"a": np.array([[1, 0], [1, 2]]), "b": np.array([[0, 0], [0, 5]])}).axes
    a, b = ax.containers
    assert [bar.get_height() for bar in a] == [50, 50] and [bar.get_height() for bar in b] == [0, 100]
    assert a[0].get_hatch() != b[0].get_hatch()


def test_gates_are_the_share_of_tokens_that_moved_more():
    (ax,) = flip_figures.gate_moves({"a": np.array([0.0, 1e-3])}, {"a": np.array([0.1, 0.3, 0.3, 1.0])}).axes
    same, other = ax.lines
    after = np.searchsorted(flip_figures.MOVED, 0.2)
    assert same.get_ydata()[0] == 50 and same.get_ydata()[after] == 0
    assert other.get_ydata()[0] == 100 and other.get_ydata()[after] == 75 and other.get_ydata()[-1] == 0
    assert (same.get_label(), other.get_label()) == ("a, same experts", "a, other experts")


def test_domains_are_in_the_order_of_the_first_trace():
    rates = {"a": rate([5, 1, 3], [10, 10, 10]), "b": rate([1, 2, 3], [10, 10, 10])}
    (ax,) = flip_figures.by_domain(rates, ["x", "y", "z"]).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["y", "z", "x"]
    a, b = (container.lines[0].get_xdata() for container in ax.containers)
    np.testing.assert_allclose(a, [10, 30, 50])
    np.testing.assert_allclose(b, [20, 30, 10])


def test_depth_compares_with_independence_and_leaves_out_what_few_tokens_say():
    figure = flip_figures.with_depth({"a": depth()}, LAYERS)
    left, right = figure.axes
    np.testing.assert_allclose([line.get_ydata() for line in left.lines], [[10, 30, 50], [10, 35, 60]])
    after, before = right.containers
    assert [(x, y) for x, y, *_ in shown(after)] == [(1, 10), (2, 10)]
    assert [(x, y) for x, y, *_ in shown(before)] == [(0, 9), (1, 9), (2, 9)]
