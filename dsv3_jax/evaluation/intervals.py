"""Estimates with their uncertainty: a share, a ratio of sums over documents, pass@k over problems [§4.4, §5.3].

All intervals are of 95 %.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.analysis import metrics

DRAWS = 1000


class Estimate(NamedTuple):
    """`low` and `high` bound the interval."""

    value: float
    low: float
    high: float


def wilson(n_right: int, n: int) -> Estimate:
    """The share `n_right / n` with Wilson's score interval, which stays within 0..1 and is right for few records too.

    Raises ValueError without a record.
    """
    if not 0 <= n_right <= n or n < 1:
        raise ValueError(f"wilson: expected 0 <= right <= records and at least one record, got {n_right} of {n}")
    low, high = metrics.wilson(np.array(n_right), np.array(n))
    return Estimate(n_right / n, float(low), float(high))


def bootstrap_ratio(above: Float[np.ndarray, "n"], below: Float[np.ndarray, "n"], seed: int) -> Estimate:
    """sum(above) / sum(below) over documents, which are drawn again with replacement; the interval is of percentiles.

    One document has no interval: both ends are the value. Raises ValueError without one.
    """
    n = len(above)
    if not n:
        raise ValueError("bootstrap_ratio: expected at least one document, got none")
    value = float(above.sum() / below.sum())
    if n == 1:
        return Estimate(value, value, value)
    rng, drawn = np.random.default_rng(seed), np.empty(DRAWS)
    for i in range(DRAWS):
        chosen = rng.integers(0, n, n)
        drawn[i] = above[chosen].sum() / below[chosen].sum()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def pass_at_k(n_samples: int, n_passed: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k samples passes: 1 - C(n - c, k) / C(n, k).

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= n_samples or not 0 <= n_passed <= n_samples:
        raise ValueError(f"pass_at_k: expected 1 <= k <= samples and 0 <= passed <= samples, got {k}, {n_samples}, {n_passed}")
    # Python's integers are exact; the quotient is rounded once.
    return 1.0 - math.comb(n_samples - n_passed, k) / math.comb(n_samples, k)


def mean_pass_at_k(n_passed: Sequence[int], n_samples: Int[np.ndarray, "problems"], k: int, seed: int) -> Estimate:
    """Over problems, with an interval from drawing the problems again; Wilson's where every problem is 0 or 1, for what is
    drawn from equals would never differ."""
    each = np.array([pass_at_k(int(n), int(c), k) for n, c in zip(n_samples, n_passed, strict=True)])
    if np.isin(each, (0.0, 1.0)).all():
        return wilson(int(each.sum()), len(each))
    return bootstrap_ratio(each, np.ones(len(each)), seed)
