"""Figures of balance over training: what they show is what they were given, and nothing hangs on colour alone."""

import io

import numpy as np
import pytest

from dsv3_jax.analysis import balance, balance_figures, figures

RNG = np.random.default_rng(0)
T, L, E = 40, 2, 8
STEPS = {name: np.arange(1, T + 1) for name in ("sign", "none")}
LAYERS = ["3", "mtp 1"]


def of_runs(*shape):
    return {name: RNG.random(shape) for name in STEPS}


def bias(experts=E, steps=T):
    return np.cumsum(RNG.choice([-1e-3, 0, 1e-3], (steps, L, experts)), axis=0).astype(np.float32)


def map_of(load):
    return balance.load_map(np.array(load, np.int32))


def rated(values=3):
    return balance.Balanced(10 * np.arange(1, values + 1), RNG.random(values), RNG.random((values, E)).astype(np.float32))


def paths(experts=E, steps=T, runs=1):
    names = [str(i) for i in range(runs)]
    biases = {name: bias(experts, steps) for name in names}
    turned = {name: balance.turned(b) for name, b in biases.items()}
    return balance_figures.bias_paths({name: np.arange(1, steps + 1) for name in names}, biases, turned, LAYERS)


def experts():
    return balance_figures.Experts(bias()[-1].astype(float), RNG.random((L, E)), np.ones((L, E)), RNG.random((L, E)))


DRAWN = {
    "violation": lambda: balance_figures.violation(STEPS, of_runs(T), of_runs(T), "4 steps"),
    "no window yet": lambda: balance_figures.violation(
        {"a": np.arange(1, 3)}, {"a": np.zeros(2)}, {"a": np.full(2, np.nan)}, "4 steps"
    ),
    "long": lambda: balance_figures.violation(
        {"a": np.arange(1, 5002)}, {"a": RNG.random(5001)}, {"a": RNG.random(5001)}, "500 steps"
    ),
    "by layer": lambda: balance_figures.violation_by_layer(STEPS, of_runs(T, L), LAYERS, "4 steps"),
    "five runs": lambda: balance_figures.violation_by_layer(
        {str(i): np.arange(1, 9) for i in range(5)}, {str(i): np.full((8, 2), np.nan) for i in range(5)}, LAYERS, "4 steps"
    ),
    "load": lambda: balance_figures.load_maps(STEPS, {n: map_of(RNG.integers(0, 9, (T, E))) for n in STEPS}, "3"),
    "no load": lambda: balance_figures.load_maps({"a": np.array([7])}, {"a": map_of(np.zeros((1, E)))}, "3"),
    "bias": paths,
    "bias of two runs": lambda: paths(runs=2),
    "bias of two experts, one step": lambda: paths(2, 1),
    "bias against load": lambda: balance_figures.bias_against_load({"sign": experts(), "centred": experts()}, LAYERS),
    "speeds": lambda: balance_figures.speeds({"u = 1": rated(), "u = 2": rated(1)}, 0.1),
    "saturation": lambda: balance_figures.saturation({"a": [1, 2], "b": [2]}, {"a": np.array([0.5, 1]), "b": np.ones(1)}, 0.25),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_draw_without_a_warning_and_name_their_axes(name):
    figure = DRAWN[name]()
    figure.savefig(io.BytesIO(), dpi=40)
    shown = [ax for ax in figure.axes if ax.axison]
    assert shown and all(ax.get_xlabel() or ax.get_label() == "<colorbar>" for ax in shown) and shown[0].get_ylabel()


def test_violations_of_batches_are_smoothed_and_those_of_windows_are_not():
    batch, window = np.where(np.arange(T) % 2, 2.0, 0.0), np.linspace(3, 1, T)
    figure = balance_figures.violation({"a": STEPS["sign"]}, {"a": batch}, {"a": window}, "4 steps")
    left, right = figure.axes
    values = left.lines[0].get_ydata()
    expected, average, weight = [], 0.0, 0.0
    for value in batch:  # debiased, over a fiftieth of the run or one step
        decay = np.exp(-1.0)
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        expected.append(average / weight)
    np.testing.assert_allclose(values, expected)
    np.testing.assert_array_equal(right.lines[0].get_ydata(), window)
    assert left.get_ylim() == right.get_ylim() and "4 steps" in right.get_title()


def test_runs_and_layers_differ_in_dash_and_marker():
    runs = balance_figures.violation(STEPS, of_runs(T), of_runs(T), "4 steps").axes[0].lines
    layers = balance_figures.violation_by_layer(STEPS, of_runs(T, L), LAYERS, "4 steps").axes[0].lines
    for first, second in (runs, layers):
        assert first.get_linestyle() != second.get_linestyle() and first.get_marker() != second.get_marker()


def test_panels_are_runs_and_their_lines_layers():
    values = of_runs(T, L)
    figure = balance_figures.violation_by_layer(STEPS, values, LAYERS, "4 steps")
    for ax, name in zip(figure.axes, STEPS, strict=True):
        assert ax.get_title() == name
        np.testing.assert_array_equal([line.get_ydata() for line in ax.lines], values[name].T)


def test_maps_of_load_show_relative_load_at_the_steps_of_the_run():
    load = [[3, 1], [1, 3], [0, 4], [2, 2]]
    figure = balance_figures.load_maps({"a": np.array([11, 12, 13, 14])}, {"a": map_of(load)}, "3")
    mesh = figure.axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_array(), [[1.5, 0.5, 0, 1], [0.5, 1.5, 2, 1]])
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [10.5, 11.5, 12.5, 13.5, 14.5])
    assert mesh.get_clim() == (0, 2) and mesh.get_cmap().name == figures.MAP
    crowded = balance_figures.load_maps({"a": np.array([1])}, {"a": map_of([[9, 0, 0, 0, 0, 0, 0, 0, 0]])}, "3")
    assert crowded.axes[0].collections[0].get_clim() == (0, 4)


def test_biases_are_shown_beside_the_layer_s_mean_and_the_outermost_by_number():
    b = np.zeros((3, 2, 8), np.float32)
    b[:, 0] = 0.5 + np.linspace(0, 1, 3)[:, None] * np.array([0, 5, -3, 1, 2, -6, 4, -3.0]) * 0.01
    figure = balance_figures.bias_paths({"a": np.array([5, 6, 7])}, {"a": b}, {"a": balance.turned(b)}, LAYERS)
    left, middle, right = figure.axes
    ends = [line.get_ydata()[-1] for line in left.lines]
    np.testing.assert_allclose(ends, 0.01 * np.array([0, 5, -3, 1, 2, -6, 4, -3]), atol=1e-7)  # biases are float32
    assert {text.get_text() for text in left.texts} == {"5", "2", "7", "4", "6", "1"}
    heights = [text.xy[1] for text in left.texts]
    assert all(b - a > 0.05 * np.ptp(left.get_ylim()) for a, b in zip(heights, heights[1:], strict=False))
    spread, mean = middle.lines[:2]
    np.testing.assert_allclose(spread.get_ydata(), b[:, 0].std(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(mean.get_ydata(), 0.5, rtol=1e-6)
    assert mean.get_markerfacecolor() == "white" and right.get_ylim() == (0, 100)


def test_an_expert_is_a_point_of_its_bias_and_its_loads():
    bias_LE = np.array([[0.3, 0.1, 0.2], [0.0, 0.0, 0.0]])
    early, late, turns = np.array([[0.5, 1.5, 1.0], [1, 1, 1.0]]), np.ones((2, 3)), np.array([[0.1, 0.2, 0.3]] * 2)
    figure = balance_figures.bias_against_load({"sign": balance_figures.Experts(bias_LE, early, late, turns)}, LAYERS)
    left, middle, right = (ax.lines[0] for ax in figure.axes)
    np.testing.assert_allclose(left.get_data(), [early[0], [0.1, -0.1, 0.0]], atol=1e-12)
    np.testing.assert_allclose(middle.get_data(), [late[0], [0.1, -0.1, 0.0]], atol=1e-12)
    np.testing.assert_allclose(right.get_data(), [[0.1, 0.1, 0.0], [10, 20, 30]], atol=1e-12)
    labels = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert labels == ["layer 3\nr early -1.00, late -", "layer mtp 1\nr early -, late -"]


def test_speeds_show_violation_and_spread_beside_that_of_the_scores():
    each = rated()
    left, right = balance_figures.speeds({"u = 1": each}, 0.25).axes
    np.testing.assert_array_equal(left.lines[0].get_data(), [each.step_S, each.violation_S])
    np.testing.assert_allclose(right.lines[0].get_ydata(), each.bias_SE.std(axis=1), rtol=1e-5)
    assert right.lines[1].get_ydata() == [0.25, 0.25]


def test_saturation_is_in_percent_beside_chance():
    (ax,) = DRAWN["saturation"]().axes
    assert ax.lines[0].get_ydata().tolist() == [50, 100] and ax.lines[-1].get_ydata() == [25, 25]


def test_long_runs_are_thinned_to_what_a_line_can_show():
    for n in (1, 999, 1000, 1001, 5001):
        assert len(np.arange(n)[balance_figures.thin(np.arange(n))]) <= 1000
    assert len(np.arange(1000)[balance_figures.thin(np.arange(1000))]) == 1000
