"""Claims of the report, judged by runs of several seeds: reproduced, contradicted, or not resolved.

A claim is about the difference of two arms in one measure, paired by seed, or about one arm's value. It is judged by Student's
95 % interval alone; a claim that is not resolved comes with the smallest difference that as many seeds would have found in four
cases of five.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from dsv3_jax.analysis.metrics import paired_interval

Verdict = Literal["reproduced", "contradicted", "not resolved"]
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`measure` of `arm` is lower or higher than that of arm `than`, or equal to it up to `within`.

    Without `than` the arm's value itself is compared with `value`. `report`: what the report has to say, with its source.
    """

    text: str
    measure: str
    arm: str
    expects: Literal["lower", "higher", "equal"]
    than: str | None = None
    value: float = 0.0
    within: float = 0.0
    report: str = "no figure"

    def __post_init__(self) -> None:
        if (self.expects == "equal") != (self.within > 0):
            raise ValueError(f"within: expected more than 0 for claims of equality, and 0 for others, got {self.within}")

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,) if self.than is None else (self.arm, self.than)


def verdict_of(mean: float, half_width: float | None, claim: Claim) -> Verdict:
    """Of the interval mean +- half_width of (arm - than), or of (arm - value); None: one seed, which resolves nothing."""
    if half_width is None or not math.isfinite(mean):
        return "not resolved"
    low, high = mean - half_width, mean + half_width
    if claim.expects == "equal":
        holds, fails = -claim.within <= low and high <= claim.within, low > claim.within or high < -claim.within
    else:
        holds, fails = (high < 0, low > 0) if claim.expects == "lower" else (low > 0, high < 0)
    return "reproduced" if holds else "contradicted" if fails else "not resolved"


def smallest_detectable(differences: Sequence[float], power: float = POWER, confidence: float = 0.95) -> float | None:
    """The difference whose interval would have excluded 0 with probability `power`, of as many and as scattered pairs.

    (t_confidence + t_power) times the standard error; None of fewer than two.
    """
    n = len(differences)
    if n < 2:
        return None
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    return float(stats.t.ppf(0.5 + confidence / 2, n - 1) + stats.t.ppf(power, n - 1)) * error


def judge(claim: Claim, scores: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """JSON-able: the claim, its arms' means, the difference with its interval, and the verdict. `scores`: arm -> per seed.

    `not_finite`: of how many runs the measure is no finite number. With one such run nothing is resolved and what it enters is
    None: the pairs without it would be a choice of seeds by their outcome.
    """
    values = [score[claim.measure] for score in scores[claim.arm]]
    others = [claim.value] * len(values) if claim.than is None else [score[claim.measure] for score in scores[claim.than]]
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    mean, half_width, detectable = None, None, None
    if all(map(math.isfinite, pairs)):
        mean, half_width, _ = paired_interval(pairs)
        detectable = smallest_detectable(pairs)
    return {
        **dataclasses.asdict(claim),
        "arm_mean": _mean(values),
        "than_mean": _mean(others),
        "mean": mean,
        "half_width_95": half_width,
        "detectable": detectable,
        "not_finite": sum(not math.isfinite(value) for value in (*values, *others)),
        "verdict": "not resolved" if mean is None else verdict_of(mean, half_width, claim),
    }


def _mean(values: Sequence[float]) -> float | None:
    """None where JSON has no number for it."""
    return float(np.mean(values)) if all(map(math.isfinite, values)) else None
