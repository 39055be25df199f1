"""Every figure draws, also from records with gaps."""

import numpy as np
import pytest

from dsv3_jax.analysis import figures

LAYERS, DOMAINS, EXPERTS = ["layer 1", "MTP 1"], ["code", "prose"], 24


def record(step):
    skipped = step == 3
    value = None if skipped else 5.0 / step
    return {
        "step": step, "main_loss": value, "mtp_loss": value, "grad_norm": value, "learning_rate": 1e-3 * step,
        "domain_loss": {"code": value, "prose": None}, "nonfinite": ["loss"] if skipped else [],
        "max_vio": [0.5, None if skipped else 1.0], "max_vio_mean": 0.7,
    }  # fmt: skip


RECORDS = [record(s) for s in range(1, 8)]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.losses(RECORDS),
        lambda: figures.losses(RECORDS[:1]),
        lambda: figures.violation(RECORDS, LAYERS),
        lambda: figures.bias_paths(np.arange(7), RNG.normal(size=(7, 2, EXPERTS)), LAYERS),
        lambda: figures.load_map(RNG.uniform(size=(2, EXPERTS)), LAYERS, "load"),
        lambda: figures.load_map(RNG.uniform(size=(2, 4)), LAYERS, "load"),
        lambda: figures.domain_maps(RNG.uniform(size=(2, 2, EXPERTS)), DOMAINS, LAYERS, "domains"),
    ],
)
def test_figures_draw_without_a_warning(draw, tmp_path):
    figures.save(draw(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_small_maps_carry_their_numbers_so_that_no_colour_is_needed():
    ax = figures.load_map(np.array([[0.5, 1.5], [1.0, 1.0]]), LAYERS, "load").axes[0]
    assert [t.get_text() for t in ax.texts] == ["0.5", "1.5", "1.0", "1.0"]


def test_neighbouring_lines_differ_in_dash_and_not_only_in_colour():
    dashes = [str(figures.style(i)["linestyle"]) for i in range(12)]
    assert all(a != b for a, b in zip(dashes, dashes[1:], strict=False))
    assert len({(str(figures.style(i)["linestyle"]), figures.style(i)["color"]) for i in range(40)}) == 40
