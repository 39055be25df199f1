"""Do counts fit a distribution? Pearson's test at a level that fixed seeds either pass or do not."""

import numpy as np

LEVEL = 1e-3


def rejected(counts: np.ndarray, probabilities: np.ndarray, level: float = LEVEL) -> bool:
    """Whether counts of outcomes are too far from what `probabilities` lets expect. An outcome of probability 0 is too far."""
    counts, probabilities = np.ravel(counts), np.ravel(probabilities)
    possible = probabilities > 0
    if counts[~possible].any():
        return True
    expected = counts.sum() * probabilities[possible]
    assert expected.min() >= 5, "too few draws for outcomes so rare"
    statistic = np.sum((counts[possible] - expected) ** 2 / expected)
    return bool(statistic > _quantile(possible.sum() - 1, level))


def _quantile(degrees: int, level: float) -> float:
    """Of the chi-square distribution, by Wilson and Hilferty: off by less than a hundredth from 3 degrees on."""
    from statistics import NormalDist

    if degrees == 0:
        return 0.0
    z = NormalDist().inv_cdf(1 - level)
    return degrees * (1 - 2 / (9 * degrees) + z * (2 / (9 * degrees)) ** 0.5) ** 3
