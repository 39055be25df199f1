"""What is asked of the planner, beside the run's config and the chip [§3, §4.2]."""

import math
from typing import Literal, NamedTuple

from dsv3_jax.parallel.schedules import SCHEDULES, UNIT, Costs


class Question(NamedTuple):
    chips: int
    compute: Literal["bf16", "fp8"] = "bf16"  # of linear layers
    tokens: float | None = None  # of the whole run; None: the config's
    dollars_per_hour: float = 2.0  # of one device
    mfu: float | None = None  # to plan with, beside the bounds
    context: int = 4096  # tokens cached of a sequence that is served
    requests: int = 32  # sequences that a device serves at a time
    output_tokens_per_second: float | None = None  # of a device, where it has been measured
    schedule: str | None = None  # pipeline schedule to simulate, or all
    stages: int | None = None  # of it; None: the mesh's pipe axis
    micro_batches: int | None = None
    costs: Costs = UNIT


def check(q: Question) -> None:
    """Raises ValueError for a number or a name that makes no sense."""
    positive = ("tokens", "dollars_per_hour", "mfu", "context", "requests", "output_tokens_per_second")
    for name in positive:
        value = getattr(q, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name}: expected a positive number, got {value}")
    if q.mfu is not None and q.mfu > 1:
        raise ValueError(f"--mfu: expected a share of the peak, at most 1, got {q.mfu}")
    if q.compute not in ("bf16", "fp8"):
        raise ValueError(f"--compute: expected bf16 or fp8, got {q.compute!r}")
    if q.schedule not in (None, "all", *SCHEDULES):
        raise ValueError(f"--schedule: expected one of all, {', '.join(SCHEDULES)}, got {q.schedule!r}")
