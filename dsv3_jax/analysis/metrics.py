"""Measures over a run's records [§4.5.3, appendix C]: smoothing, relative expert load, paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats


def smooth(values: Sequence[float | None], span: float) -> Float[np.ndarray, "T"]:
    """Debiased exponential average over about `span` steps; None (a skipped step) changes nothing, NaN before the first."""
    decay = math.exp(-1 / span)
    average, weight, out = 0.0, 0.0, np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if value is not None:
            average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        if weight:
            out[i] = average / weight
    return out


def relative_load(load: Int[np.ndarray, "*rows E"]) -> Float[np.ndarray, "*rows E"]:
    """Each expert's count over the mean of its row: 1 is balance, the report's "relative expert load". Rows of zeros: 0."""
    mean = load.mean(axis=-1, keepdims=True)
    return np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)


def max_violation(load: Int[np.ndarray, "*rows E"]) -> Float[np.ndarray, "*rows"]:
    """MaxVio = max load / mean load - 1 of each row (arXiv 2408.15664)."""
    return relative_load(load).max(axis=-1) - 1


class Interval(NamedTuple):
    """Mean of paired differences and half the width of its 95 % interval; None where one pair says nothing of spread."""

    mean: float
    half_width: float | None
    pairs: int


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean. Raises ValueError without a difference."""
    if not len(differences):
        raise ValueError("paired_interval: expected at least one difference, got none")
    values, n = np.asarray(differences, np.float64), len(differences)
    if n == 1:
        return Interval(float(values[0]), None, 1)
    t = float(stats.t.ppf(0.5 + confidence / 2, n - 1))
    return Interval(float(values.mean()), t * float(values.std(ddof=1)) / math.sqrt(n), n)
