"""Paired differences: what both arms share cancels."""

import json
import math

import numpy as np
import pytest

from dsv3_jax.analysis.comparison import MEASURES, compare, differences, draw, scores, table
from dsv3_jax.analysis.figures import save


def run(bits, max_vio, loss=2.0):
    validation = {"raw": {"bits_per_byte": {"all": bits}, "loss": {"all": loss}}}
    steps = [{"step": s, "main_loss": 5.0 / s, "max_vio_mean": 100.0 if s <= 2 else max_vio} for s in range(1, 5)]
    return {"validation": validation, "metrics": steps}


SEEDS = [0.0, 10.0, -20.0]  # what a seed adds to both arms: far more than their difference
RUNS = {
    "controller=sign": [run(3 + s, 0.5) for s in SEEDS],
    "controller=none": [run(3.5 + s + e, 2.0) for s, e in zip(SEEDS, (0.1, -0.1, 0.0), strict=True)],
}


def test_differences_are_taken_within_a_seed_against_the_first_arm():
    result = compare(RUNS)
    d = result["differences"]["controller=none"]["bits_per_byte"]
    np.testing.assert_allclose(d["pairs"], [0.6, 0.4, 0.5], rtol=1e-9)
    assert d["mean"] == pytest.approx(0.5) and 0.2 < d["half_width_95"] < 0.3
    assert list(result["differences"]) == ["controller=none"] and result["baseline"] == "controller=sign"


def test_max_vio_is_of_the_second_half_of_training():
    assert [v["max_vio"] for v in compare(RUNS)["scores"]["controller=sign"]] == [0.5] * 3


def test_table_and_figure_show_every_arm_also_with_one_seed(tmp_path):
    text = table(compare(RUNS))
    assert "+0.5000 +- 0.248" in text and max(map(len, text.splitlines())) <= 100
    single = {arm: runs[:1] for arm, runs in RUNS.items()}
    text = table(compare(single))
    assert "interval not available with 1 seed" in text and "+-" not in text.split("\n", 1)[1]
    for runs in (RUNS, single):
        save(draw(runs, compare(runs)), tmp_path / "compare.png")
        assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_without_a_finite_validation_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        compare({"a": [run(None, 0.1)], "b": [run(1.0, 0.1)]})


def test_differences_are_json_where_a_run_is_not_finite_and_say_so(tmp_path):
    bad = {arm: [scores(one) for one in runs] for arm, runs in RUNS.items()}
    bad["controller=none"][1]["loss"] = math.inf
    bad["controller=none"][2]["bits_per_byte"] = math.nan
    result = differences(bad)
    json.dumps(result, allow_nan=False)
    d = result["differences"]["controller=none"]["loss"]
    assert (d["mean"], d["half_width_95"], d["pairs"][1]) == (None, None, None) and d["pairs"][0] == 0.0
    assert result["scores"]["controller=none"][1]["loss"] is None
    lines = [line.rstrip() for line in table(result).splitlines() if line.startswith("  controller=none")]
    assert [line.endswith("not finite") for line in lines] == [True, True, False]
    save(draw(RUNS, result, MEASURES), tmp_path / "compare.png")
    assert math.isnan(scores(run(None, 0.1))["bits_per_byte"])
