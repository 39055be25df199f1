"""Pipeline schedules beside their published figures [§3.2.1, Table 2]: what the planner lists, and draws."""

import math
from collections.abc import Iterator

from dsv3_jax.parallel.schedules import SCHEDULES, Costs
from dsv3_jax.parallel.simulate import Timeline, compare, simulate
from dsv3_jax.planner.question import Question
from dsv3_jax.planner.rows import Row, Section
from dsv3_jax.settings import parse_settings

DRAWN = (8, 20)  # stages and micro-batches, unless others are asked for: those of the report's Fig. 5


def costs_of(settings: list[str]) -> Costs:
    """`["F=1.13", ...]` in place of the units.

    Raises ValueError for a name that is none of theirs, and for what is no number.
    """
    changed = {}
    for name, text in parse_settings(settings).items():
        if name not in Costs._fields:
            raise ValueError(f"--schedule_set: expected one of {', '.join(Costs._fields)}, got {name!r}")
        try:
            changed[name] = float(text)
        except ValueError:
            raise ValueError(f"--schedule_set: {name}: expected a number, got {text!r}") from None
    return Costs(**changed)


def section(pipe: int, q: Question) -> Section:
    """Every schedule that is asked for, simulated: idle time of the rank that idles most, activations of the fullest."""
    stages, micro_batches = _sizes(pipe, q)
    rows = []
    for r in compare(stages, micro_batches, q.costs):
        if q.schedule in ("all", r.name):
            apart = 0 if math.isclose(r.idle, r.published_idle, rel_tol=1e-9) else r.difference
            values = r.idle, r.published_idle, apart, r.peak, SCHEDULES[r.name].parameters, r.ranks
            rows.append(Row(r.name, r.name, values, ("",)))
    title = f"Pipelines, {stages} stages, {micro_batches} micro-batches"
    return Section("schedules", title, tuple(rows), ("idle", "formula", "apart", "kept", "weights", "ranks"))


def assumptions(found: Section, c: Costs) -> Iterator[str]:
    """Of `section`'s figures."""
    yield (
        f"Pipelines are simulated with F = {c.F:g}, B = {c.B:g} (W in it), W = {c.W:g}, F&B = {c.FB:g}, a hop = {c.hop:g}: "
        "idle time of the rank that idles most, beside the published formula; activations kept at once, in micro-batches on "
        "one stage; stages whose weights a rank holds. The figures above do not contain them."
    )
    for row in found.rows:
        method = SCHEDULES[row.key]
        differs = "" if not row.values[2] else f"; the simulation differs, and agrees without hops for {method.exact}"
        yield f"{row.key}: a rank idles {method.formula} by the formula{differs}."


def timelines(pipe: int, q: Question) -> Iterator[Timeline]:
    """Of the schedules that are asked for."""
    stages, micro_batches = _sizes(pipe, q)
    for name, method in SCHEDULES.items():
        if q.schedule in ("all", name):
            yield simulate(method.build(method.devices(stages), micro_batches), q.costs)


def _sizes(pipe: int, q: Question) -> tuple[int, int]:
    """Stages and micro-batches. Raises ValueError for numbers that no schedule can have."""
    stages = q.stages or (pipe if pipe > 1 else DRAWN[0])
    if stages < 2 or stages % 2:
        raise ValueError(f"--stages: expected an even number, at least 2, got {stages}")
    micro_batches = q.micro_batches or max(DRAWN[1], 2 * stages)
    if micro_batches < 1:
        raise ValueError(f"--micro_batches: expected at least 1, got {micro_batches}")
    return stages, micro_batches
