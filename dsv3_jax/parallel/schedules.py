"""Pipeline schedules as data [§3.2.1, Table 2, Figs. 4-5]: 1F1B, ZB1P, DualPipe and DualPipeV.

A schedule lists for every rank what it computes, in order; when each entry can start is for `simulate` to find. A chunk is one
micro-batch on one stage: F forward, B full backward, I the backward's input gradient alone, W its weight gradient. Two chunks
in one action are overlapped, "F&B": the communication of each hides behind the other's computation.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Literal, NamedTuple


class Chunk(NamedTuple):
    """`stage` counts along the micro-batch's own way; micro-batch numbers are unique over both directions.

    Direction 1 runs from the last rank to rank 0: in DualPipe the second stream of micro-batches, in DualPipeV the way back.
    """

    kind: Literal["F", "B", "I", "W"]
    micro_batch: int
    stage: int
    direction: int = 0


Action = tuple[Chunk, ...]  # one chunk, or an overlapped forward and backward


class Schedule(NamedTuple):
    name: str
    stages: int
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]  # [rank][position]


class Costs(NamedTuple):
    """Durations in any one unit. B includes W, so the input gradient alone takes B - W."""

    F: int | float = 1
    B: int | float = 2
    W: int | float = 1
    FB: int | float = 3  # an overlapped pair; F + B: overlapping saves nothing
    hop: int | float = 0  # from one rank to another


UNIT = Costs()  # F = I = W = 1


class Method(NamedTuple):
    """How to build a schedule, and what is published about it for PP stages."""

    build: Callable[[int, int], Schedule]  # (ranks, micro-batches)
    formula: str
    bubble: Callable[[int, Costs], int | float]  # (PP, costs): idle time of a rank
    exact: str  # for which costs the simulation finds just that (`simulate.compare`); hop = 0 throughout
    parameters: int  # stages whose weights a device holds
    activations: Callable[[int], int]  # (PP): most that a device keeps, in micro-batches on one stage
    devices: Callable[[int], int]  # (PP)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """Rank r runs PP - 1 - r forwards ahead, then one forward and one backward in turn."""
    _check_positive("1f1b", ranks, micro_batches)

    def rank_actions(rank: int) -> Iterator[Action]:
        ahead = ranks - 1 - rank
        for i in range(-ahead, micro_batches):
            if i + ahead < micro_batches:
                yield (Chunk("F", i + ahead, rank),)
            if i >= 0:
                yield (Chunk("B", i, rank),)

    return _schedule("1f1b", ranks, ranks, micro_batches, rank_actions)


def zb1p(ranks: int, micro_batches: int) -> Schedule:
    """ZB-H1, the handcrafted one of the zero-bubble paper (arXiv 2401.10241): 1F1B whose rank r computes W r turns after I.

    So the last rank answers its first micro-batches without computing W, gradients reach rank 0 sooner, and the weight
    gradients still owed at the end fill the drain. No rank keeps more activations than rank 0 does under 1F1B.
    """
    _check_positive("zb1p", ranks, micro_batches)

    def rank_actions(rank: int) -> Iterator[Action]:
        ahead = ranks - 1 - rank
        for i in range(-ahead, micro_batches + rank):
            if i + ahead < micro_batches:
                yield (Chunk("F", i + ahead, rank),)
            if 0 <= i < micro_batches:
                yield (Chunk("I", i, rank),)
            if i >= rank:
                yield (Chunk("W", i - rank, rank),)

    return _schedule("zb1p", ranks, ranks, micro_batches, rank_actions)


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """Half of the micro-batches enter at rank 0, half at the last rank; rank r holds stages r and PP - 1 - r."""
    if ranks < 2 or ranks % 2:
        raise ValueError(f"dualpipe: expected an even number of ranks, at least 2, got {ranks}; add one or take dualpipev")
    if micro_batches < 2 * ranks or micro_batches % 2:
        raise ValueError(
            f"dualpipe: expected an even number of micro-batches, at least 2 x {ranks} ranks, got {micro_batches}; "
            f"split the batch into {max(2 * ranks, micro_batches + micro_batches % 2)}"
        )
    half, each = ranks // 2, micro_batches // 2

    def rank_actions(rank: int) -> Iterator[Action]:
        depth, own = min(rank, ranks - 1 - rank), int(rank >= half)
        lanes = _Lane(depth, own, own * each), _Lane(ranks - 1 - depth, 1 - own, (1 - own) * each)
        return _eight_steps(half, depth, each, lanes)

    return _schedule("dualpipe", ranks, ranks, micro_batches, rank_actions)


def dualpipev(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe's first half of the ranks alone: micro-batches go down a V and back, rank r holds stages r and PP - 1 - r."""
    if ranks < 1 or micro_batches < 2 * ranks:
        raise ValueError(
            f"dualpipev: expected at least one rank and two micro-batches a rank, got {ranks} and {micro_batches}; "
            f"split the batch into {2 * max(1, ranks)}"
        )

    def rank_actions(rank: int) -> Iterator[Action]:
        return _eight_steps(ranks, rank, micro_batches, (_Lane(rank, 0, 0), _Lane(2 * ranks - 1 - rank, 1, 0)))

    return _schedule("dualpipev", 2 * ranks, ranks, micro_batches, rank_actions)


def dualpipe_steps(half: int, depth: int, micro_batches: int) -> tuple[int, ...]:
    """How often a rank repeats each of DualPipe's eight steps, `depth` ranks away from its end of the `half` = PP/2 ranks.

    `micro_batches` are those of one direction. DualPipeV counts alike: `half` its ranks, all its micro-batches.
    """
    if not 0 <= depth < half <= micro_batches / 2:
        raise ValueError(f"expected 0 <= depth < half <= micro_batches / 2, got {depth}, {half}, {micro_batches}; see dualpipe")
    rest = half - depth - 1
    steps = (2 * rest, depth + 1, rest, micro_batches - 2 * half + depth + 1, rest, depth + 1, rest, depth + 1)
    one, two, three, four, five, six, seven, eight = steps
    assert one + two + four == two + three + four + five == micro_batches, "each lane runs every micro-batch forward once"
    assert three + four + five + six == four + five + six + seven == micro_batches, "and backward once"
    assert three + six + seven == three + seven + eight, "every W put off (six of them in step 6) is made up for"
    return steps


class _Lane(NamedTuple):
    """One of the two stages of a DualPipe rank: lane 0 is the one that its micro-batches pass first, lane 1 the other."""

    stage: int
    direction: int
    first: int  # its first micro-batch


def _eight_steps(half: int, depth: int, micro_batches: int, lanes: tuple[_Lane, _Lane]) -> Iterator[Action]:
    forwards, backwards = ([count(lane.first) for lane in lanes] for _ in range(2))
    owed: deque[Chunk] = deque()

    def forward(lane: int) -> Action:
        return (Chunk("F", next(forwards[lane]), lanes[lane].stage, lanes[lane].direction),)

    def backward(lane: int) -> Action:
        return (Chunk("B", next(backwards[lane]), lanes[lane].stage, lanes[lane].direction),)

    def input_gradient(lane: int) -> Action:
        (chunk,) = backward(lane)
        owed.append(chunk._replace(kind="W"))
        return (chunk._replace(kind="I"),)

    def weight_gradient() -> Action:
        return (owed.popleft(),)

    one, two, three, four, five, six, seven, eight = dualpipe_steps(half, depth, micro_batches)
    for _ in range(one):
        yield forward(0)
    for _ in range(two):
        yield from (forward(0), forward(1))
    for _ in range(three):
        yield from (input_gradient(1), weight_gradient(), forward(1))
    for i in range(four):
        if i == 0 and depth == half - 1:  # in the middle, where the other direction's F and B come from: see `simulate.compare`
            yield from (forward(0), backward(1))
        else:
            yield forward(0) + backward(1)
        yield forward(1) + backward(0)
    for _ in range(five):
        yield from (backward(1), forward(1) + backward(0))
    for i in range(2 * six):  # the later half puts W off: gradients leave sooner, and W fills the drain
        yield (input_gradient if i >= six else backward)(1 - i % 2)
    for _ in range(seven):
        yield from (weight_gradient(), input_gradient(0))
    for _ in range(eight):
        yield weight_gradient()


def _schedule(
    name: str, stages: int, ranks: int, micro_batches: int, rank_actions: Callable[[int], Iterator[Action]]
) -> Schedule:
    return Schedule(name, stages, micro_batches, tuple(tuple(rank_actions(rank)) for rank in range(ranks)))


def _check_positive(name: str, ranks: int, micro_batches: int) -> None:
    if min(ranks, micro_batches) < 1:
        raise ValueError(f"{name}: expected ranks and micro-batches of at least 1, got {ranks} and {micro_batches}; raise them")


def _all(pp: int) -> int:
    return pp


def _dual(build: Callable[[int, int], Schedule], devices: Callable[[int], int]) -> Method:
    return Method(
        build,
        "(PP/2 - 1)(F&B + B - 3W)",
        lambda pp, c: (pp // 2 - 1) * (c.FB + c.B - 3 * c.W),
        "F = B - W >= W",
        parameters=2,
        activations=lambda pp: pp + 1,
        devices=devices,
    )


SCHEDULES: dict[str, Method] = {
    "1f1b": Method(one_f_one_b, "(PP - 1)(F + B)", lambda pp, c: (pp - 1) * (c.F + c.B), "any", 1, _all, _all),
    "zb1p": Method(
        zb1p,
        "(PP - 1)(F + B - 2W)",
        lambda pp, c: (pp - 1) * (c.F + c.B - 2 * c.W),
        "W <= F and W <= B - W, with at least PP micro-batches",
        parameters=1,
        activations=_all,
        devices=_all,
    ),
    "dualpipe": _dual(dualpipe, devices=_all),
    "dualpipev": _dual(dualpipev, devices=lambda pp: pp // 2),
}
