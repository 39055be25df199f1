"""The grouped products on TPU's matrix units.

The grid walks blocks of the output's columns, then the list of (group, tile of rows), then the contraction: a group's weights
are read once, and a tile of rows once for each block of columns. Where a tile holds rows of several groups, each writes its own
and leaves the others, while the tile stays in VMEM. Within a step loops over parts of the tile, as high as there are rows of
the group for, leave out those without one.

What lies beyond an operand's edge is undefined, and so are rows between the groups' and the end: products keep rows apart, so
they meet nothing there; sums over a ragged contraction select what is theirs first, on both sides, since 0 * NaN is NaN.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped.blocks_tpu import Blocks, blocks_of, fit_products, of_float32
from dsv3_jax.kernels.grouped.call import PARTIAL, Epilogue, Out
from dsv3_jax.kernels.grouped.grid_tpu import Place, call, cut, walk
from dsv3_jax.kernels.grouped.work import make_work
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import LANES, dot, estimate


def products(
    x_RI: jax.Array,
    weights: Sequence[jax.Array],
    extras: Sequence[jax.Array],
    count_E: jax.Array,
    outs: Sequence[Out],
    epilogue: Epilogue,
    *,
    transposed: bool,
    name: str,
    interpret: Any,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, ...]:
    """As `call.Products`."""
    (rows, inner), n_groups = x_RI.shape, weights[0].shape[0]
    outer = weights[0].shape[1 if transposed else 2]
    wide = sum(v.shape[1] > 1 for v in extras) + len(outs)
    blocks = blocks or blocks_of(chip(), len(weights), transposed, inner, wide)
    if x_RI.dtype == jnp.float32:
        blocks = of_float32(blocks, len(weights))
    blocks = fit_products(blocks, rows, inner, outer)
    n_inner, n_outer = pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer)
    none = rows - count_E.sum(dtype=jnp.int32)  # a last group without weights, so that every row belongs to one
    work = make_work(jnp.append(count_E, none), rows, blocks.rows)
    partial_columns = PARTIAL if blocks.columns % PARTIAL == 0 else blocks.columns
    n_columns = [partial_columns if out.partial else blocks.columns for out in outs]
    iterations = blocks.outer // blocks.columns
    n_sums = len(weights) if len(weights) > 1 or n_inner > 1 else 0  # else a product goes straight to the epilogue
    n_turned = len(weights) if transposed and blocks.turns else 0
    as_is = transposed and not n_turned

    def kernel(group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, *refs: Any) -> None:
        ws, more, ys, sums, turned, waiting = cut(refs, len(weights), len(extras), len(outs), n_sums, n_turned)
        j, s, k = (pl.program_id(axis) for axis in range(3))
        group = group_S[s]

        def place(at: Place, width: int) -> tuple[Any, Any]:
            return pl.ds(at.row, at.height), _columns(at.column, width)

        def store(at: Place, values: Sequence[Any]) -> None:
            row = lax.broadcasted_iota(jnp.int32, (at.height, 1), 0) + tile_S[s] * blocks.rows + at.row
            own = (row >= first_G[group]) & (row < end_G[group])
            for y, value, width in zip(ys, values, n_columns, strict=True):
                y_at = place(at, width)
                y[y_at] = jnp.where(own, value, y[y_at].astype(jnp.float32)).astype(y.dtype)

        def finish(at: Place, totals: Sequence[Any]) -> None:
            rows_at, columns_at = place(at, blocks.columns)
            beside = [v[rows_at, slice(None) if v.shape[1] == 1 else columns_at].astype(jnp.float32) for v in more]
            if outer % blocks.outer:  # partial sums take columns together
                column = lax.broadcasted_iota(jnp.int32, (1, blocks.columns), 1)
                within = column + j * blocks.outer + at.column * blocks.columns < outer
                totals, beside = ([jnp.where(within, v, 0.0) for v in values] for values in (totals, beside))
            values = epilogue(totals, beside)
            store(at, [_folded(value, width) for value, width in zip(values, n_columns, strict=True)])

        def each(heights: Sequence[int], body: Callable[[Place], None]) -> None:
            """For all columns of those rows of the tile among which are the group's, in as few and as high parts as will do."""
            first = jnp.maximum(first_G[group] - tile_S[s] * blocks.rows, 0)
            end = jnp.minimum(end_G[group] - tile_S[s] * blocks.rows, blocks.rows)
            walk(first, end, heights, iterations, body)

        def part(w: Any, at: Place) -> jax.Array:
            rows_at, columns_at = place(at, blocks.columns)
            total: Any = None
            for start, end in pairwise(blocks.cuts):
                a, b = x[rows_at, start:end], w[columns_at, start:end] if as_is else w[start:end, columns_at]
                left = inner - k * blocks.inner - start if inner % blocks.inner else None
                product = _product(a, b, left, transposed=as_is)
                total = product if total is None else waiting[0][: at.height, :] + product
                if end < blocks.inner:
                    waiting[0][: at.height, :] = total
            return total

        def turn() -> None:
            fresh = (n_inner > 1) | (s == 0) | (group_S[jnp.maximum(s - 1, 0)] != group)
            depth = blocks.inner // blocks.turns

            def run(i: Any, _: None) -> None:
                for w, to in zip(ws, turned, strict=True):
                    to[_columns(i, depth), :] = w[:, _columns(i, depth)].T

            lax.fori_loop(0, jnp.where(fresh, blocks.turns, 0), run, None)

        def add(w: Any, total: Any, at: Place) -> None:
            total_at = place(at, blocks.columns)
            total[total_at] = part(w, at) if n_inner == 1 else jnp.where(k > 0, total[total_at], 0.0) + part(w, at)

        @pl.when(group < n_groups)
        def compute() -> None:
            heights, sides = (blocks.height, *blocks.pieces), turned or ws
            if turned:
                turn()
            if not sums:
                return each(heights, lambda at: finish(at, [part(sides[0], at)]))
            for w, total in zip(sides, sums, strict=True):  # one after the other: registers hold the sums of one
                each(heights, partial(add, w, total))
            pl.when(k == n_inner - 1)(
                lambda: each(heights, lambda at: finish(at, [total[place(at, blocks.columns)] for total in sums]))
            )

        @pl.when(group == n_groups)
        def clear() -> None:
            each([blocks.height], lambda at: store(at, [jnp.zeros((at.height, width), jnp.float32) for width in n_columns]))

    def x_at(j: Any, s: Any, k: Any, group_S: Any, tile_S: Any, *_: Any) -> Any:
        return tile_S[s], k

    def weight_at(j: Any, s: Any, k: Any, group_S: Any, *_: Any) -> Any:
        group = jnp.minimum(group_S[s], n_groups - 1)
        return (group, j, k) if transposed else (group, k, j)

    def row_at(j: Any, s: Any, k: Any, group_S: Any, tile_S: Any, *_: Any) -> Any:
        return tile_S[s], j

    def first_at(j: Any, s: Any, k: Any, group_S: Any, tile_S: Any, *_: Any) -> Any:
        return tile_S[s], 0

    sides = (blocks.outer, blocks.inner) if transposed else (blocks.inner, blocks.outer)
    shapes = [(rows, n_outer * iterations * partial_columns if out.partial else outer) for out in outs]
    results = [result(shape, out.dtype, x_RI, interpret) for shape, out in zip(shapes, outs, strict=True)]
    one, row = pl.BlockSpec((blocks.rows, 1), first_at), pl.BlockSpec((blocks.rows, blocks.outer), row_at)
    ins = [
        pl.BlockSpec((blocks.rows, blocks.inner), x_at),
        *(pl.BlockSpec((None, *sides), weight_at) for _ in weights),
        *(one if v.shape[1] == 1 else row for v in extras),
    ]
    found = call(
        kernel,
        (n_outer, work.size, n_inner),
        ("parallel", "arbitrary", "arbitrary"),
        (work[:4], [x_RI, *weights, *extras], results),
        (ins, [pl.BlockSpec((blocks.rows, iterations * width), row_at) for width in n_columns]),
        [
            *[pltpu.VMEM((blocks.rows, blocks.outer), jnp.float32)] * n_sums,
            *[pltpu.VMEM((blocks.inner, blocks.outer), x_RI.dtype)] * n_turned,
            *[pltpu.VMEM((blocks.height, blocks.columns), jnp.float32)] * (len(blocks.cuts) > 2),
        ],
        streamed=blocks.streamed,
        vmem_mib=blocks.vmem_mib,
        cost_estimate=estimate(2 * rows * inner * outer * len(weights), x_RI, *weights, *extras, *results),
        name=name,
        interpret=interpret,
    )
    return tuple(found)


def _folded(values: jax.Array, width: int) -> jax.Array:
    """Every `width` columns, added up."""
    first, *others = (values[:, start : start + width] for start in range(0, values.shape[1], width))
    return sum(others, start=first)


def _columns(i: Any, width: int) -> Any:
    start = i * width
    return pl.ds(pl.multiple_of(start, width) if width % LANES == 0 else start, width)


def _product(a: jax.Array, b: jax.Array, left: Any, *, transposed: bool) -> jax.Array:
    """Of the contraction what is within the operands: all of it, or `left`."""
    axis = int(transposed)
    if left is not None:
        a, b = (
            jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, along) < left, v, jnp.zeros((), v.dtype))
            for v, along in ((a, 1), (b, axis))
        )
    return dot(a, b, 1, axis)
