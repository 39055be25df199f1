"""The FP8 products' grids for `bench_kernels`, on TPU: steps, trips, bytes and FLOPs, for given groups of rows."""

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp

from dsv3_jax.kernels.grouped.cost import Cost, entries_of
from dsv3_jax.kernels.scaled import pallas_tpu
from dsv3_jax.kernels.scaled.call import SIDE
from dsv3_jax.kernels.tiles import LANES, PACKED
from dsv3_jax.kernels.traffic import Operand, moved

NARROW, SCALE, RESULT = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def product_cost(
    counts: Sequence[int], rows: int, inner: int, outer: int, blocks: pallas_tpu.Blocks, *, transposed: bool, fp8: bool
) -> Cost:
    """Of `products` of rows [R, I] and weights [G, I, O], or [G, O, I] if `transposed`; `fp8`: what the chip multiplies.

    `trips`: of a copy's start, loops that convert rows and weights (those that there are), of the products, and of rows without
    a group. Raises ValueError for more than one block of the contraction.
    """
    b, none = pallas_tpu.fit_products(blocks, rows, inner, outer), len(counts)
    if inner > b.inner:
        raise ValueError(f"product_cost: expected one block of the contraction, {b.inner}, got {inner}")
    entries = entries_of([*counts, rows - sum(counts)], b.rows)
    n_outer, iterations, n = -(-outer // b.outer), b.outer // b.columns, len(entries)
    runs = [(-(-end // b.height) - first // b.height) * iterations for _, _, first, end in entries]
    own = sum(run for run, (group, *_) in zip(runs, entries, strict=True) if group < none)
    groups, tiles = [group for group, *_ in entries], [tile for _, tile, *_ in entries]
    converted = []
    for values, size, as_it_is in ((tiles, b.rows // PACKED, fp8), (groups, b.inner // SIDE, fp8 and transposed)):
        changes = [i for i, (one, two) in enumerate(pairwise([None, *values])) if one != two and groups[i] < none]
        if not as_it_is:
            converted.append(size * len(changes) / n)
    if transposed and not fp8:  # as the weights lie
        converted[1] *= b.outer / PACKED / (b.inner // SIDE)
    trips = (1.0, *converted, own / b.unroll / n, (sum(runs) - own) / b.unroll / n)
    scales = [-(-size // SIDE) for size in ((outer, inner) if transposed else (inner, outer))]
    sides, block = ((outer, inner), (b.outer, b.inner)) if transposed else ((inner, outer), (b.inner, b.outer))

    def weights_at(j: int, s: int) -> tuple[int, int, int]:
        group = min(groups[s], none - 1)
        return (group, j, 0) if transposed else (group, 0, j)

    operands = [
        Operand((rows, inner), NARROW, (b.rows, b.inner), lambda j, s: (tiles[s], 0)),
        Operand((rows, -(-inner // SIDE)), SCALE, (b.rows, b.inner // SIDE), lambda j, s: (tiles[s], 0)),
        Operand((none, *sides), NARROW, (1, *block), weights_at),
        Operand((none, *scales), SCALE, (1, *scales), lambda j, s: (min(groups[s], none - 1), 0, 0)),
        Operand((rows, outer), RESULT, (b.rows, b.outer), lambda j, s: (tiles[s], j)),
    ]
    return Cost(
        n_outer * n, trips, moved((n_outer, n), operands), sum(x.bytes for x in operands),
        2 * n_outer * own * b.height * b.columns * b.inner, 2 * sum(counts) * inner * outer,
    )  # fmt: skip


def outer_cost(counts: Sequence[int], rows: int, inner: int, outer: int, blocks: pallas_tpu.Blocks, *, fp8: bool) -> Cost:
    """Of `outer_products` of [I, R] and [R, O], counts in whole tiles. `trips`: of loops that convert, add up rows
    that are all of one group, or not, and store."""
    b = pallas_tpu.fit_outer(blocks, rows, inner, outer)
    entries = [(group, tile) for group, tile, *_ in entries_of(counts, b.rows)]
    entries += [(group, 0) for group, n in enumerate(counts) if not n]
    n_inner, n_outer, n = -(-inner // b.inner), -(-outer // b.outer), len(entries)
    turns = (b.inner // b.height) * (b.outer // b.columns)
    converted = () if fp8 else (b.inner / PACKED, b.rows / PACKED)
    whole = sum(end - first == b.rows for _, _, first, end in entries_of(counts, b.rows)) / n
    trips = (*converted, whole * turns / b.unroll, (1 - whole) * turns / b.unroll, turns * len(counts) / n)
    each = LANES // (b.rows // SIDE)
    operands = [
        Operand((inner, rows), NARROW, (b.inner, b.rows), lambda i, j, s: (i, entries[s][1])),
        Operand((inner, -(-rows // SIDE)), SCALE, (b.inner, LANES), lambda i, j, s: (i, entries[s][1] // each)),
        Operand((rows, outer), NARROW, (b.rows, b.outer), lambda i, j, s: (entries[s][1], j)),
        Operand((-(-rows // SIDE), outer), SCALE, (b.rows // SIDE, b.outer), lambda i, j, s: (entries[s][1], j)),
        Operand((len(counts), inner, outer), RESULT, (1, b.inner, b.outer), lambda i, j, s: (entries[s][0], i, j)),
    ]
    return Cost(
        n_inner * n_outer * n, trips, moved((n_inner, n_outer, n), operands), sum(x.bytes for x in operands),
        2 * n_inner * n_outer * n * b.rows * b.inner * b.outer, 2 * sum(counts) * inner * outer,
    )  # fmt: skip
