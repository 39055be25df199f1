"""What the TPU kernels' grids do for given group sizes, in plain Python: steps, iterations, bytes, FLOPs, beside the least."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.kernels.grouped.blocks_tpu import Blocks, OuterBlocks, fit_outer, fit_products

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


def parts_of(entries: Sequence[tuple[int, int, int, int]], heights: Sequence[int]) -> dict[int, int]:
    """Of each height the parts that the entries' rows are walked in."""
    found, least = dict.fromkeys(heights, 0), heights[-1]
    for _, _, first, end in entries:
        left = -(-end // least) - first // least
        for height in heights:
            n, left = divmod(left, height // least)
            found[height] += n
    return found


def of_products(
    counts: Sequence[int], rows: int, inner: int, outer: int, blocks: Blocks, *, weights: int, wide_extras: int, outs: int,
    transposed: bool = False, itemsize: int = 2,
) -> Cost:  # fmt: skip
    """Of `products` with so many weights, extras [R, O] and outputs [R, O], all of `itemsize`."""
    b, used, none = fit_products(blocks, rows, inner, outer), sum(counts), len(counts)
    n_outer, n_inner, iterations = -(-outer // b.outer), -(-inner // b.inner), b.outer // b.columns
    entries = entries_of([*counts, rows - used], b.rows)
    mine = [entry for entry in entries if entry[0] < none]
    parts = parts_of(mine, (b.height, *b.pieces))
    zeroed = parts_of([entry for entry in entries if entry[0] == none], (b.height,))
    each, zero = (tuple(n * iterations / len(entries) for n in found.values()) for found in (parts, zeroed))
    direct = weights == 1 and n_inner == 1
    trips = each + zero if direct else each * weights + tuple(n / n_inner for n in each) + zero
    if transposed and b.turns:
        fresh = _changes([group for group, *_ in mine]) if n_inner == 1 else len(mine)
        trips = (b.turns * fresh / len(entries), *trips)
    # A block that is asked for twice in a row is fetched once. Rows of no group ask for the last group's weights.
    tiles = _changes([t for _, t, _, _ in entries])
    x, w = (tiles, _changes([min(group, none - 1) for group, *_ in entries])) if n_inner == 1 else (len(entries),) * 2
    moved = x * b.rows * inner + w * inner * b.outer * weights + tiles * b.rows * b.outer * (wide_extras + outs)
    least = rows * inner + none * inner * outer * weights + rows * outer * (wide_extras + outs)
    multiplied = sum(height * n for height, n in parts.items())
    return Cost(
        n_outer * len(entries) * n_inner, trips, n_outer * moved * itemsize, least * itemsize,
        2 * multiplied * b.outer * inner * n_outer * weights, 2 * used * inner * outer * weights,
    )  # fmt: skip


def _changes(values: Sequence[int]) -> int:
    return sum(a != b for a, b in zip([None, *values], values, strict=False))


def of_outer(counts: Sequence[int], rows: int, inner: int, outer: int, blocks: OuterBlocks, itemsize: int = 2) -> Cost:
    """Of `outer_products`."""
    b = fit_outer(blocks, rows, inner, outer)
    n_inner, n_outer, empty = -(-inner // b.inner), -(-outer // b.outer), sum(n == 0 for n in counts)
    entries = entries_of(counts, b.rows)
    ragged = [entry for entry in entries if entry[3] - entry[2] < b.rows]
    parts, whole = parts_of(ragged, b.pieces), len(entries) - len(ragged)
    steps = len(entries) + empty
    multiplied = whole * b.rows + sum(height * n for height, n in parts.items())
    moved = -(-rows // b.rows) * b.rows * (b.inner + b.outer) + len(counts) * b.inner * b.outer
    least = rows * (inner + outer) + len(counts) * inner * outer
    return Cost(
        n_inner * n_outer * steps, tuple(n / steps for n in (whole, *parts.values(), len(counts) - empty, empty)),
        n_inner * n_outer * moved * itemsize, least * itemsize,
        2 * n_inner * n_outer * multiplied * b.inner * b.outer, 2 * sum(counts) * inner * outer,
    )  # fmt: skip
