"""A verdict is the interval's and nothing else's; what could have been detected is detected as often as it says."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dsv3_jax.analysis.ablation import POWER, Claim, judge, smallest_detectable, verdict_of
from dsv3_jax.analysis.metrics import paired_interval


def claim(expects, within=0.0, **others):
    return Claim(text="t", measure="loss", arm="a", than="b", expects=expects, within=within, **others)


@pytest.mark.parametrize(
    ("expects", "mean", "half", "verdict"),
    [
        ("lower", -1.0, 0.5, "reproduced"),
        ("lower", 1.0, 0.5, "contradicted"),
        ("lower", -1.0, 1.5, "not resolved"),
        ("lower", -1.0, 1.0, "not resolved"),  # the interval touches 0
        ("higher", 1.0, 0.5, "reproduced"),
        ("higher", -1.0, 0.5, "contradicted"),
        ("higher", 0.1, 0.5, "not resolved"),
        ("equal", 0.1, 0.1, "reproduced"),
        ("equal", -0.1, 0.2, "not resolved"),
        ("equal", 0.5, 0.1, "contradicted"),
        ("equal", -0.5, 0.1, "contradicted"),
        ("equal", 0.2, 0.5, "not resolved"),
        ("lower", -1.0, None, "not resolved"),  # one seed
        ("lower", float("nan"), 0.1, "not resolved"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(expects, mean, half, verdict):
    assert verdict_of(mean, half, claim(expects, 0.25 if expects == "equal" else 0.0)) == verdict


@given(st.floats(-2, 2), st.floats(0, 2), st.sampled_from(["lower", "higher"]))
def test_a_claim_and_its_opposite_are_never_both_reproduced(mean, half, expects):
    opposite = {"lower": "higher", "higher": "lower"}[expects]
    one, other = (verdict_of(mean, half, claim(which)) for which in (expects, opposite))
    assert (one == "reproduced") == (other == "contradicted") and {one, other} != {"reproduced"}


def test_equality_needs_a_margin_and_only_equality_has_one():
    with pytest.raises(ValueError, match="within: expected more than 0 for claims of equality"):
        claim("equal")
    with pytest.raises(ValueError, match="and 0 for others, got 0.1"):
        claim("lower", 0.1)


def test_differences_are_paired_by_seed_and_absolute_claims_are_of_the_arm_alone():
    scores = {"a": [{"loss": 3.0}, {"loss": 13.0}, {"loss": -7.0}], "b": [{"loss": 3.1}, {"loss": 13.2}, {"loss": -6.7}]}
    found = judge(claim("lower"), scores)
    mean, half, _ = paired_interval([-0.1, -0.2, -0.3])
    assert found["mean"] == pytest.approx(mean) and found["half_width_95"] == pytest.approx(half)
    assert found["verdict"] == "not resolved" and found["detectable"] > half
    assert (found["arm_mean"], found["than_mean"]) == (pytest.approx(3.0), pytest.approx(3.2))
    alone = judge(Claim(text="t", measure="loss", arm="a", expects="equal", value=3.0, within=100.0), scores)
    assert alone["mean"] == pytest.approx(0.0) and alone["arm_mean"] == pytest.approx(3.0) and alone["than"] is None
    assert alone["verdict"] == "reproduced"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_that_is_not_finite_resolves_nothing_and_is_counted_in_json(bad):
    scores = {"a": [{"loss": 1.0}, {"loss": bad}, {"loss": 1.0}], "b": [{"loss": 9.0}, {"loss": bad}, {"loss": 9.1}]}
    found = judge(claim("lower"), scores)
    assert found["verdict"] == "not resolved" and found["not_finite"] == 2
    assert [found[name] for name in ("arm_mean", "than_mean", "mean", "half_width_95", "detectable")] == [None] * 5
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    scores["b"][1] = {"loss": 9.2}
    found = judge(claim("lower"), scores)
    assert found["not_finite"] == 1 and found["arm_mean"] is None and found["than_mean"] == pytest.approx(9.1)
    alone = judge(Claim(text="t", measure="loss", arm="a", expects="lower", value=5.0), scores)
    assert (alone["not_finite"], alone["arm_mean"], alone["mean"], alone["than_mean"]) == (1, None, None, 5.0)
    assert alone["verdict"] == "not resolved"
    scores["a"][1] = {"loss": 1.0}
    found = judge(claim("lower"), scores)
    assert found["not_finite"] == 0 and found["verdict"] == "reproduced"


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_smallest_detectable_difference_is_found_with_about_the_stated_power(n):
    """By the noncentral t distribution; the sum of two quantiles is an approximation of it, somewhat low for few seeds."""
    pairs = list(np.arange(n, dtype=float))
    in_errors = smallest_detectable(pairs) / (np.std(pairs, ddof=1) / np.sqrt(n))
    power = 1 - stats.nct.cdf(stats.t.ppf(0.975, n - 1), n - 1, in_errors)
    assert POWER - 0.08 < power < POWER


def test_one_seed_detects_nothing():
    assert smallest_detectable([0.1]) is None
