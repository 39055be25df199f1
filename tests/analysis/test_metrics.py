"""Measures over records, against their definitions."""

import numpy as np
import pytest

from dsv3_jax.analysis.metrics import max_violation, paired_interval, relative_load, smooth


def test_relative_load_and_max_violation_of_a_known_count():
    load = np.array([[3, 2, 2, 1], [0, 0, 0, 0], [5, 5, 5, 5]])
    np.testing.assert_array_equal(relative_load(load), [[1.5, 1, 1, 0.5], [0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(max_violation(load), [0.5, -1, 0])  # 3/2 - 1: facts of the balance example


def test_the_interval_is_students_t_of_the_paired_differences():
    # t(0.975, 2 degrees of freedom) = 4.302652729911275, from the tables
    mean, half_width, pairs = paired_interval([1.0, 2.0, 6.0])
    assert (mean, pairs) == (3.0, 3)
    assert half_width == pytest.approx(4.302652729911275 * np.sqrt(7.0) / np.sqrt(3), rel=1e-9)


def test_one_pair_has_no_interval_and_none_is_refused():
    assert paired_interval([0.25]) == (0.25, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        paired_interval([])


def test_smoothing_is_unbiased_from_the_first_value_on_and_steps_over_skipped_steps():
    np.testing.assert_allclose(smooth([2.0] * 5, 10.0), 2.0)
    line = smooth([None, 1.0, None, 1.0, 3.0], 2.0)
    assert np.isnan(line[0]) and line[2] == line[1] == 1.0 and 1 < line[4] < 3
    np.testing.assert_allclose(smooth([1.0, 5.0, 2.0], 1e-9), [1, 5, 2])  # a span of nothing smooths nothing
