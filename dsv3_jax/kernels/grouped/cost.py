"""What the TPU kernels' grids do for given group sizes, in plain Python: steps, iterations, bytes, FLOPs, beside the least."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.kernels.grouped.pallas_tpu import Blocks, fit_outer, fit_products

FLOAT32 = 4


class Cost(NamedTuple):
    """Of one call. `trips`: runs of each loop inside a grid step, on average, in the order of the program."""

    steps: int
    trips: tuple[float, ...]
    bytes: int  # between HBM and VMEM
    least_bytes: int  # each operand and each result once
    flops: int
    least_flops: int


def entries_of(counts: Sequence[int], tile: int) -> list[tuple[int, int, int, int]]:
    """(group, tile, first row in it, row behind the last) of every tile that a group's rows touch, group by group."""
    ends = [int(end) for end in np.cumsum(counts)]
    return [
        (group, t, max(0, end - n - t * tile), min(tile, end - t * tile))
        for group, (end, n) in enumerate(zip(ends, counts, strict=True))
        for t in range((end - n) // tile, -(-end // tile))
        if n
    ]


def of_products(
    counts: Sequence[int], rows: int, inner: int, outer: int, blocks: Blocks, *, weights: int, wide_extras: int, outs: int,
    itemsize: int = 2,
) -> Cost:  # fmt: skip
    """Of `products` with so many weights, extras [R, O] and outputs [R, O], all of `itemsize`."""
    b, used, none = fit_products(blocks, rows, inner, outer), sum(counts), len(counts)
    n_outer, n_inner, iterations = -(-outer // b.outer), -(-inner // b.inner), b.outer // b.columns
    entries = entries_of([*counts, rows - used], b.rows)
    parts = Counter[bool]()
    for group, _, first, end in entries:
        parts[group < none] += (-(-end // b.height) - first // b.height) * iterations
    per_step, zero = parts[True] / len(entries), parts[False] / len(entries)
    direct = weights == 1 and n_inner == 1
    trips = (per_step, zero) if direct else (*(per_step,) * weights, per_step / n_inner, zero)
    # A block that is asked for twice in a row is fetched once. Rows of no group ask for the last group's weights.
    tiles = _changes([t for _, t, _, _ in entries])
    x, w = (tiles, _changes([min(group, none - 1) for group, *_ in entries])) if n_inner == 1 else (len(entries),) * 2
    moved = x * b.rows * inner + w * inner * b.outer * weights + tiles * b.rows * b.outer * (wide_extras + outs)
    least = rows * inner + none * inner * outer * weights + rows * outer * (wide_extras + outs)
    return Cost(
        n_outer * len(entries) * n_inner, trips, n_outer * moved * itemsize, least * itemsize,
        2 * parts[True] * b.height * b.columns * inner * n_outer * weights, 2 * used * inner * outer * weights,
    )  # fmt: skip


def _changes(values: Sequence[int]) -> int:
    return sum(a != b for a, b in zip([None, *values], values, strict=False))


def of_outer(counts: Sequence[int], rows: int, inner: int, outer: int, blocks: Blocks, itemsize: int = 2) -> Cost:
    """Of `outer_products`."""
    b = fit_outer(blocks, rows, inner, outer)
    n_inner, n_outer = -(-inner // b.inner), -(-outer // b.outer)
    entries = len(entries_of(counts, b.rows)) + sum(n == 0 for n in counts)
    runs = (b.inner // b.height) * (b.outer // b.columns)
    tiles = -(-rows // b.rows)
    moved = tiles * b.rows * (b.inner + b.outer) + len(counts) * b.inner * b.outer
    least = rows * (inner + outer) + len(counts) * inner * outer
    return Cost(
        n_inner * n_outer * entries, (runs / b.unroll, runs * len(counts) / entries), n_inner * n_outer * moved * itemsize,
        least * itemsize, 2 * n_inner * n_outer * entries * b.rows * b.inner * b.outer, 2 * sum(counts) * inner * outer,
    )  # fmt: skip
