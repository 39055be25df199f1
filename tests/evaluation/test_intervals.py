"""Intervals against their definitions, pass@k against all the ways of choosing."""

import itertools
import math

import numpy as np
import pytest

from dsv3_jax.evaluation.intervals import bootstrap_ratio, mean_pass_at_k, pass_at_k, wilson

Z = 1.959963984540054  # the normal distribution's 97.5 % point


@pytest.mark.parametrize(("right", "n"), [(1, 3), (7, 10), (50, 100), (999, 1000)])
def test_wilsons_ends_are_the_shares_that_the_observed_one_is_just_not_too_far_from(right, n):
    found = wilson(right, n)
    assert found.value == right / n and 0 < found.low < found.value < found.high < 1
    for end in (found.low, found.high):
        assert abs(end - found.value) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-9)


def test_wilsons_interval_of_none_and_of_all_is_not_empty():
    none, every = wilson(0, 5), wilson(5, 5)
    assert none.value == none.low == 0 and none.high == pytest.approx(Z**2 / (5 + Z**2))
    assert every.value == every.high == 1 and every.low == pytest.approx(1 - none.high)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(right, n):
    with pytest.raises(ValueError, match="at least one record"):
        wilson(right, n)


def test_pass_at_k_is_the_share_of_choices_of_k_samples_with_one_that_passes():
    for n in range(1, 8):
        for c in range(n + 1):
            passed = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                share = np.mean([any(chosen) for chosen in itertools.combinations(passed, k)])
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1)])
def test_pass_at_k_of_too_few_samples_is_refused(n, c, k):
    with pytest.raises(ValueError, match="expected 1 <= k <= samples"):
        pass_at_k(n, c, k)


def test_problems_are_drawn_again_and_where_none_differs_the_interval_is_wilsons():
    found = mean_pass_at_k([1, 2, 0], np.array([2, 2, 2]), 1, seed=0)
    assert found.value == pytest.approx(0.5) and found.low == 0 and found.high == 1
    assert mean_pass_at_k([0, 0, 0], np.array([2, 2, 2]), 1, seed=0) == wilson(0, 3)


def test_the_bootstrap_is_as_wide_as_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).standard_normal(400) + 5
    found = bootstrap_ratio(values, np.ones(400), seed=1)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    # A thousand draws know the ends of the interval to some 5 %.
    assert found.high - found.value == pytest.approx(half, rel=0.12) and found.value - found.low == pytest.approx(
        half, rel=0.12
    )
    assert bootstrap_ratio(values, np.ones(400), seed=1) == found


def test_long_documents_weigh_more():
    assert bootstrap_ratio(np.array([10.0, 10.0]), np.array([10.0, 30.0]), seed=0).value == pytest.approx(0.5)
    assert bootstrap_ratio(np.array([3.0]), np.array([2.0]), seed=0) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="at least one document"):
        bootstrap_ratio(np.array([]), np.array([]), seed=0)
