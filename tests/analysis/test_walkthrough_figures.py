"""Figures of the report's mechanisms: they show what they were given, with axes named."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax.analysis import figures, walkthrough_figures
from dsv3_jax.presets import preset
from dsv3_jax.training.schedules import total_tokens

LOADS = np.array([[6, 2, 0], [4, 4, 1], [3, 3, 3]])
V3 = preset("deepseek_v3_671b")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: walkthrough_figures.balancing(LOADS, 0.001),
        lambda: walkthrough_figures.tile_errors({"1 x 128": [0.02, 0.03], "whole": [0.02, 0.3]}, [1.0, 1024.0]),
        lambda: walkthrough_figures.schedules(V3),
        lambda: walkthrough_figures.schedules(preset("tiny")),
        lambda: walkthrough_figures.frequencies(np.array([1.0, 0.1]), np.array([1.0, 0.01]), 64, 640),
    ],
)
def test_figures_draw_without_a_warning_and_name_their_axes(draw, tmp_path):
    figure = draw()
    figures.save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)


def test_balancing_shows_first_and_last_loads_and_max_violation():
    left, right = walkthrough_figures.balancing(LOADS, 0.001).axes
    np.testing.assert_allclose([patch.get_height() for patch in left.patches], [6 / (8 / 3), 2 / (8 / 3), 0, 1, 1, 1])
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["first step", "after 2 updates"]
    np.testing.assert_allclose(right.lines[0].get_ydata(), [6 / (8 / 3) - 1, 1 / 3, 0])


def test_tile_errors_are_percent():
    (ax,) = walkthrough_figures.tile_errors({"tile": [0.02, 0.03], "tensor": [0.02, 0.3]}, [1.0, 1024.0]).axes
    np.testing.assert_allclose([line.get_ydata() for line in ax.lines], [[2, 3], [2, 30]])
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()


def test_schedules_of_deepseek_v3_pass_through_the_published_points():
    rate, batch, speed, weight = (ax.lines[0].get_data() for ax in walkthrough_figures.schedules(V3).axes)
    for (tokens, values), at, expected in [
        (rate, 5, 2.2), (rate, 12.15, 1.21), (rate, 14.5, 0.22), (rate, 14.7, 0.073), (batch, 0, 3072), (batch, 0.2345, 9216),
        (batch, 1, 15360), (speed, 14, 1e-3), (speed, 14.5, 0), (weight, 9, 0.3), (weight, 11, 0.1),
    ]:  # fmt: skip
        assert np.interp(at, tokens, values) == pytest.approx(expected, rel=5e-3, abs=1e-9)


def test_warm_up_takes_its_steps_whatever_the_batch():
    small = dataclasses.replace(V3, train=dataclasses.replace(V3.train, batch_size_start=15360, warmup_steps=3))
    assert walkthrough_figures.warm_up_starts(small) == [i * 15360 * 4096 for i in range(4)]
    tokens, values = walkthrough_figures.schedules(small).axes[0].lines[0].get_data()
    np.testing.assert_allclose(values[:4], [2.2 / 3, 4.4 / 3, 2.2, 2.2])  # a step's own rate, at the tokens before it
    ramped = walkthrough_figures.warm_up_starts(V3)
    assert len(ramped) == 2001 and 2000 * 3072 * 4096 < ramped[-1] < 2000 * 4096 * 4096
    tokens, values = walkthrough_figures.schedules(V3).axes[0].lines[0].get_data()
    reached = 1e12 * tokens[np.argmax(values >= 2.2)]
    assert ramped[-2] <= reached <= ramped[-1] + total_tokens(V3) / walkthrough_figures.POINTS


def test_frequencies_show_turns_and_how_much_slower_they_are():
    left, right = walkthrough_figures.frequencies(np.array([1.0, 0.1]), np.array([1.0, 0.01]), 64, 640).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [2 * np.pi, 20 * np.pi])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [1, 10])
