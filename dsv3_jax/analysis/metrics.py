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


def wilson(
    hits: Int[np.ndarray, "*any"], of: Int[np.ndarray, "*any"], confidence: float = 0.95
) -> tuple[Float[np.ndarray, "*any"], Float[np.ndarray, "*any"]]:
    """Wilson's score interval (low, high) of binomial shares hits / of; NaN of nothing.

    It stays within 0..1 and is right for few trials too.
    """
    z, n = float(stats.norm.ppf(0.5 + confidence / 2)), of.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = hits / n
        centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    # Rounding must not put an end on the share's other side.
    return np.asarray(np.clip(low, 0.0, p)), np.asarray(np.clip(high, p, 1.0))
