"""Figures and tables of the latent: what they show is what they were given, and nothing hangs on colour alone."""

import numpy as np
import pytest

from dsv3_jax.analysis import figures, latent_figures
from dsv3_jax.analysis.latent import LogitParts, Study, WeightSpectra

RNG = np.random.default_rng(0)
NAMES = ["0", "1", "2"]


def falling(*shape):
    return np.sort(RNG.random(shape) + 0.1)[..., ::-1].copy()


def study(layers=3, width=8, heads=4):
    """Of random numbers; content is a quarter of the logits' variance in the first head, all of it in the last."""
    ranks = (2, 4, width)
    parts = LogitParts(np.linspace(1, 3, heads), np.linspace(3, 0, heads), np.ones(heads))
    nll = RNG.random(5)
    errors = [falling(layers, 3) for _ in range(3)]
    weights = tuple(WeightSpectra(falling(width), falling(heads, 3), falling(heads, 4)) for _ in range(layers))
    truncated = nll + np.array([[0.5], [0.25], [0.0]]) + np.array([0.1, -0.1, 0, 0, 0])
    return Study(ranks, weights, falling(layers, width), (parts,) * layers, *errors, np.zeros(layers), truncated, nll)


SIZES = {"MLA": {"BF16": 70_272, "FP8": 36_356}, "MHA": {"BF16": 3_997_696, "FP8": 2_061_312.0}}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: latent_figures.cache_bars(SIZES, "bytes"),
        lambda: latent_figures.cache_by_context({"MLA": 70_272, "MHA": 3_997_696}, [512, 1024, 131072], "GiB"),
        lambda: latent_figures.weight_spectra(study().weights, NAMES),
        lambda: latent_figures.weight_spectra(study(1, heads=1).weights, NAMES[:1]),
        lambda: latent_figures.latent_energy(falling(3, 512), NAMES),
        lambda: latent_figures.ranks_by_layer(study(61), [str(i) for i in range(61)]),
        lambda: latent_figures.logit_shares(study(), NAMES),
        lambda: latent_figures.logit_shares(study(61, heads=128), [str(i) for i in range(61)]),
        lambda: latent_figures.truncation(study()),
    ],
)
def test_figures_draw_without_a_warning_and_name_their_axes(draw, tmp_path):
    figure = draw()
    figures.save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert all(ax.get_label() == "<colorbar>" or ax.get_xlabel() for ax in figure.axes)


def test_bars_carry_their_thousands_of_bytes():
    (ax,) = latent_figures.cache_bars(SIZES, "bytes").axes
    assert [text.get_text() for text in ax.texts] == ["70.3", "3,998", "36.4", "2,061"]
    assert [patch.get_height() for patch in ax.patches] == [70_272, 3_997_696, 36_356, 2_061_312]
    assert len({patch.get_hatch() for patch in ax.patches}) == 2


def test_context_lines_are_in_gib_and_differ_without_colour():
    (ax,) = latent_figures.cache_by_context({"MLA": 2**20, "MHA": 2**21}, [1024, 2048], "GiB").axes
    np.testing.assert_allclose([line.get_ydata() for line in ax.lines], [[1, 2], [2, 4]])
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle() and ax.lines[0].get_marker() != ax.lines[1].get_marker()


def test_energy_is_the_cumulated_square():
    (ax,) = latent_figures.latent_energy(np.array([[2.0, 1.0, 1.0, 0.0]]), ["0"]).axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 100 * np.array([4, 5, 6, 6]) / 6)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [25, 50, 75, 100])


def test_map_of_logits_shows_content_s_share():
    ax = latent_figures.logit_shares(study(1), ["0"]).axes[0]
    assert [text.get_text() for text in ax.texts] == ["25", "45", "70", "100"]


def test_loss_is_drawn_as_what_truncation_adds_to_the_whole_s():
    found = study()
    right = latent_figures.truncation(found).axes[1]
    np.testing.assert_allclose(right.lines[0].get_ydata(), found.nll_N.mean() + np.array([0.5, 0.25, 0.0]))
    rows = latent_figures.truncation_table(found).split("\n")
    assert rows[1].split()[-2:] == ["+0.5000", f"{np.array([0.1, -0.1, 0, 0, 0]).std() / np.sqrt(5):.4f}"]


def test_rank_table_has_a_row_a_layer():
    even = WeightSpectra(np.ones(8), np.ones((4, 3)), np.ones((4, 4)))
    found = study(1)._replace(weights=(even,), latent_LC=np.array([[3.0, 1, 0, 0, 0, 0, 0, 0]]))
    head, row = latent_figures.rank_table(found, ["0"]).split("\n")
    assert head.startswith("layer") and row.split() == ["0", "1.8", "1", "2", "8.0", "8", "8", "3.0", "4.0"]
