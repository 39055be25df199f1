"""When a pipeline schedule's chunks run and how long its ranks idle [§3.2.1], beside the bubbles that Table 2 publishes."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.parallel.schedules import SCHEDULES, UNIT, Action, Costs, Schedule

Result = tuple[str, int, int]  # ("F", "I" or "W", micro-batch, stage)
RESULTS = {"F": "F", "B": "IW", "I": "I", "W": "W"}  # of a chunk, by its kind


class Span(NamedTuple):
    action: Action
    start: int | float
    end: int | float


class Timeline(NamedTuple):
    schedule: Schedule
    costs: Costs
    spans: tuple[tuple[Span, ...], ...]  # [rank][position]
    makespan: int | float
    idle: tuple[int | float, ...]  # [rank]: makespan minus the time in which the rank computes
    peak: tuple[int, ...]  # [rank]: most activations kept at once, in micro-batches on one stage


class Row(NamedTuple):
    """A schedule at PP stages, simulated and published: idle time of the rank that idles most, peak activations."""

    name: str
    stages: int
    ranks: int
    micro_batches: int
    idle: int | float
    published_idle: int | float
    difference: int | float  # idle - published_idle
    peak: int
    published_peak: int


def simulate(schedule: Schedule, costs: Costs = UNIT) -> Timeline:
    """Each rank computes its list in order, and each action as soon as what it needs has arrived.

    Raises ValueError for a deadlock, naming a rank, its action and what that waits for, and for chunks missing or repeated.
    """
    if not (min(costs.F, costs.B, costs.FB) > 0 and 0 <= costs.W <= costs.B and costs.hop >= 0):
        raise ValueError(f"expected positive costs and W within B, got {costs}; B is the full backward, W included")
    _check_complete(schedule)
    ready: dict[Result, tuple[int, int | float]] = {}  # where and when
    spans: list[list[Span]] = [[] for _ in schedule.actions]

    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.actions):
            for action in actions[len(spans[rank]) :]:
                needs = _needs(action, schedule.stages)
                if not needs <= ready.keys():
                    break
                start = spans[rank][-1].end if spans[rank] else 0
                for source, time in (ready[need] for need in needs):
                    start = max(start, time if source == rank else time + costs.hop)
                spans[rank].append(Span(action, start, start + duration(action, costs)))
                ready.update(dict.fromkeys(_results(action), (rank, spans[rank][-1].end)))
                progress = True

    for rank, actions in enumerate(schedule.actions):
        for action in actions[len(spans[rank]) :]:
            kind, micro_batch, stage = min(_needs(action, schedule.stages) - ready.keys())
            raise ValueError(
                f"{schedule.name}: deadlock, rank {rank} expected {kind}{micro_batch} of stage {stage} before {label(action)}, "
                "got no more from any rank; change the order of the actions"
            )
    makespan = max(rank[-1].end for rank in spans)
    return Timeline(
        schedule,
        costs,
        tuple(tuple(rank) for rank in spans),
        makespan,
        tuple(makespan - sum(duration(action, costs) for action in actions) for actions in schedule.actions),
        tuple(_peak(actions) for actions in schedule.actions),
    )


def compare(stages: int, micro_batches: int, costs: Costs = UNIT) -> list[Row]:
    """Every schedule at `stages` = PP stages, and so DualPipeV on half as many ranks.

    With I = B - W, h = PP/2 - 1, no hops and max(F, B) <= F&B <= F + B, simulated and published idle time differ by
      1F1B         0
      ZB1P         (PP - 1) max(0, W - min(F, I)), given at least PP micro-batches: with fewer, too few W fill the drain
      DualPipe(V)  h (max(0, F - I) + max(0, W - I)) - min(h max(0, I - F), F): the subtrahend is what the middle ranks gain
                   by not overlapping their first pair, which the formula leaves out
    and so by nothing for F = I = W. No formula knows hops; what they cost may grow with the number of micro-batches.
    """
    rows = []
    for name, method in SCHEDULES.items():
        ranks = method.devices(stages)
        timeline = simulate(method.build(ranks, micro_batches), costs)
        idle, published = max(timeline.idle), method.bubble(stages, costs)
        peaks = max(timeline.peak), method.activations(stages)
        rows.append(Row(name, stages, ranks, micro_batches, idle, published, idle - published, *peaks))
    return rows


def duration(action: Action, costs: Costs) -> int | float:
    if len(action) == 2:
        return costs.FB
    return {"F": costs.F, "B": costs.B, "I": costs.B - costs.W, "W": costs.W}[action[0].kind]


def label(action: Action) -> str:
    """Kinds and micro-batches, such as `F7&B2`."""
    return "&".join(f"{chunk.kind}{chunk.micro_batch}" for chunk in action)


def _results(action: Action) -> list[Result]:
    return [(kind, chunk.micro_batch, chunk.stage) for chunk in action for kind in RESULTS[chunk.kind]]


def _needs(action: Action, stages: int) -> set[Result]:
    needs: set[Result] = set()
    for kind, micro_batch, stage, _ in action:
        if kind == "W":
            needs.add(("I", micro_batch, stage))
        elif kind == "F":
            needs.add(("F", micro_batch, stage - 1))
        else:
            needs |= {("F", micro_batch, stage), ("I", micro_batch, stage + 1)}
    return {(kind, micro_batch, stage) for kind, micro_batch, stage in needs if 0 <= stage < stages}


def _peak(actions: Sequence[Action]) -> int:
    """Activations are kept from the start of F to the end of W, or of the full backward."""
    kept = peak = 0
    for action in actions:
        kinds = [kind for kind, _, _ in _results(action)]
        kept += kinds.count("F")
        peak = max(peak, kept)
        kept -= kinds.count("W")
    return peak


def _check_complete(schedule: Schedule) -> None:
    got = Counter(result for actions in schedule.actions for action in actions for result in _results(action))
    due = Counter((kind, m, s) for kind in "FIW" for m in range(schedule.micro_batches) for s in range(schedule.stages))
    for kind, micro_batch, stage in sorted((got - due) + (due - got)):
        result = (kind, micro_batch, stage)
        raise ValueError(
            f"{schedule.name}: expected {kind}{micro_batch} on stage {stage} {due[result]} times, got it {got[result]} times; "
            "list each chunk once"
        )
