"""The grouped products on TPU's matrix units.

The grid walks blocks of the output's columns, then the list of (group, tile of rows), then the contraction: a group's weights
are read once, and a tile of rows once for each block of columns. Where a tile holds rows of several groups, each writes its own
and leaves the others, while the tile stays in VMEM. Within a step a loop over parts of the tile keeps their sums in registers,
and leaves out those without a row of the group.

What lies beyond an operand's edge is undefined, and so are rows between the groups' and the end: products keep rows apart, so
they meet nothing there; sums over rows or over a ragged contraction select what is theirs first, on both sides, since 0 * NaN
is NaN.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped.call import PARTIAL, Epilogue, Out
from dsv3_jax.kernels.grouped.work import make_work
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import LANES, MIB, dot, estimate, fitted, up

SUBLANES = 16


class Blocks(NamedTuple):
    """Of a product [R, I] x [I, O]: rows, contraction and columns in VMEM; rows and columns of one iteration."""

    rows: int
    inner: int
    outer: int
    height: int
    columns: int
    unroll: int = 1  # iterations that are scheduled together
    vmem_mib: int = 32


# What needed the fewest bundles of those tried at V3's shapes, see `experiments.bench_kernels`; other chips as v5p. There sums
# of 384 x 128 are in registers, 64 of 8 x 128, and leave room for operands. Where a step has more to do with its operands,
# wide sums that are put aside between matrix units' results cost less than operands that are brought along more often; the
# units of tpu7x add up by themselves.
V5P = Blocks(768, 7168, 256, 384, 128, vmem_mib=62)
WIDE = Blocks(1024, 7168, 512, 512, 512, vmem_mib=62)
PRODUCTS = dict.fromkeys(("TPU v6 lite", "TPU7x"), WIDE)
PRODUCTS_OF_SEVERAL = {  # weights at once
    "TPU v6 lite": Blocks(512, 7168, 256, 512, 256, vmem_mib=62),
    "TPU7x": Blocks(512, 7168, 512, 512, 512, vmem_mib=62),
}
# Rows are selected and turned once for each block of columns: wide ones make that little.
V5P_OUTER = Blocks(512, 1024, 2048, 1024, 256, unroll=4, vmem_mib=40)
WIDE_OUTER = V5P_OUTER._replace(columns=512, unroll=2)
OUTER = dict.fromkeys(("TPU v6 lite", "TPU7x"), WIDE_OUTER)


def blocks_of(kind: str, weights: int, transposed: bool, inner: int, wide: int) -> Blocks:
    """Of a product with so many weights at once, on this kind of device; `wide`: extras and outputs as wide as the product."""
    if weights > 1:
        return PRODUCTS_OF_SEVERAL.get(kind, V5P)
    blocks = PRODUCTS.get(kind, WIDE if transposed else V5P)
    if inner > 4096:  # an iteration is long enough to be of fewer rows, of which then fewer are another group's
        if kind == "TPU v6 lite":
            blocks = blocks._replace(height=256)
        if kind == "TPU7x" and transposed:
            blocks = blocks._replace(height=256, columns=256)
    # In VMEM extras and outputs are beside the operands, each twice.
    return blocks._replace(rows=WIDE.rows // 2) if wide > 3 and blocks.rows == WIDE.rows else blocks


def outer_blocks_of(kind: str) -> Blocks:
    return OUTER.get(kind, V5P_OUTER)


def fit_products(blocks: Blocks, rows: int, inner: int, outer: int) -> Blocks:
    """No larger than the operands of [R, I] x [I, O]."""
    (tall, height), (wide, columns) = (
        fitted(rows, blocks.rows, blocks.height, SUBLANES), fitted(outer, blocks.outer, blocks.columns, 1)
    )  # fmt: skip
    return blocks._replace(rows=tall, inner=min(inner, blocks.inner), outer=wide, height=height, columns=columns)


def fit_outer(blocks: Blocks, rows: int, inner: int, outer: int) -> Blocks:
    """No larger than the operands of [R, I]^T x [R, O]; an iteration's height is along I."""
    (deep, height), (wide, columns) = (
        fitted(inner, blocks.inner, blocks.height, 1), fitted(outer, blocks.outer, blocks.columns, 1)
    )  # fmt: skip
    rows = min(blocks.rows, up(rows, SUBLANES))
    return blocks._replace(rows=rows, inner=deep, outer=wide, height=height, columns=columns)


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
    blocks = fit_products(blocks or blocks_of(chip(), len(weights), transposed, inner, wide), rows, inner, outer)
    n_inner, n_outer = pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer)
    none = rows - count_E.sum(dtype=jnp.int32)  # a last group without weights, so that every row belongs to one
    work = make_work(jnp.append(count_E, none), rows, blocks.rows)
    partial_columns = PARTIAL if blocks.columns % PARTIAL == 0 else blocks.columns
    n_columns = [partial_columns if out.partial else blocks.columns for out in outs]
    iterations = blocks.outer // blocks.columns
    n_sums = len(weights) if len(weights) > 1 or n_inner > 1 else 0  # else a product goes straight to the epilogue

    def kernel(group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, *refs: Any) -> None:
        ws, more, ys, sums = _cut(refs, len(weights), len(extras), len(outs))
        j, s, k = (pl.program_id(axis) for axis in range(3))
        group = group_S[s]

        def place(i: Any, width: int) -> tuple[Any, Any]:
            """Rows and columns of iteration i."""
            h, c = lax.div(i, iterations), lax.rem(i, iterations)
            return pl.ds(pl.multiple_of(h * blocks.height, blocks.height), blocks.height), _columns(c, width)

        def store(i: Any, values: Sequence[Any]) -> None:
            row = lax.broadcasted_iota(jnp.int32, (blocks.height, 1), 0)
            row = row + tile_S[s] * blocks.rows + lax.div(i, iterations) * blocks.height
            own = (row >= first_G[group]) & (row < end_G[group])
            for y, value, width in zip(ys, values, n_columns, strict=True):
                at = place(i, width)
                y[at] = jnp.where(own, value, y[at].astype(jnp.float32)).astype(y.dtype)

        def finish(i: Any, totals: Sequence[Any]) -> None:
            at = place(i, blocks.columns)
            beside = [(v[at[0], :] if v.shape[1] == 1 else v[at]).astype(jnp.float32) for v in more]
            if outer % blocks.outer:  # partial sums take columns together
                column = lax.broadcasted_iota(jnp.int32, (1, blocks.columns), 1)
                within = column + j * blocks.outer + lax.rem(i, iterations) * blocks.columns < outer
                totals, beside = ([jnp.where(within, v, 0.0) for v in values] for values in (totals, beside))
            values = epilogue(totals, beside)
            store(i, [_folded(value, width) for value, width in zip(values, n_columns, strict=True)])

        def each(body: Callable[[Any], None]) -> None:
            """For all columns of those rows of the tile among which are the group's."""
            first = jnp.maximum(first_G[group] - tile_S[s] * blocks.rows, 0)
            end = jnp.minimum(end_G[group] - tile_S[s] * blocks.rows, blocks.rows)
            low, high = lax.div(first, blocks.height), lax.div(end + blocks.height - 1, blocks.height)
            lax.fori_loop(low * iterations, high * iterations, lambda i, _: body(i), None)

        def part(w: Any, i: Any) -> jax.Array:
            rows_at, at = place(i, blocks.columns)
            return _product(x[rows_at, :], w[at, :] if transposed else w[:, at], k, inner, blocks, transposed)

        def add(w: Any, total: Any, i: Any) -> None:
            at = place(i, blocks.columns)
            total[at] = part(w, i) if n_inner == 1 else jnp.where(k > 0, total[at], 0.0) + part(w, i)

        @pl.when(group < n_groups)
        def compute() -> None:
            if not sums:
                return each(lambda i: finish(i, [part(ws[0], i)]))
            for w, total in zip(ws, sums, strict=True):  # one after the other: registers hold the sums of one
                each(partial(add, w, total))
            pl.when(k == n_inner - 1)(lambda: each(lambda i: finish(i, [total[place(i, blocks.columns)] for total in sums])))

        @pl.when(group == n_groups)
        def clear() -> None:
            zeros = [jnp.zeros((blocks.height, width), jnp.float32) for width in n_columns]
            each(lambda i: store(i, zeros))

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
    call = pl.pallas_call(
        kernel,
        out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(n_outer, work.size, n_inner),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.inner), x_at),
                *(pl.BlockSpec((None, *sides), weight_at) for _ in weights),
                *(
                    pl.BlockSpec((blocks.rows, 1), first_at)
                    if v.shape[1] == 1
                    else pl.BlockSpec((blocks.rows, blocks.outer), row_at)
                    for v in extras
                ),
            ],
            out_specs=[pl.BlockSpec((blocks.rows, iterations * width), row_at) for width in n_columns],
            scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.outer), jnp.float32)] * n_sums,
        ),
        compiler_params=_compiler(blocks, ("parallel", "arbitrary", "arbitrary")),
        cost_estimate=estimate(2 * rows * inner * outer * len(weights), x_RI, *weights, *extras, *results),
        name=name,
        interpret=interpret,
    )
    return tuple(call(*work[:4], x_RI, *weights, *extras))


def outer_products(
    x_RI: jax.Array, y_RO: jax.Array, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any, blocks: Blocks | None = None
) -> jax.Array:
    """As `call.OuterProducts`."""
    (rows, inner), outer, n_groups = x_RI.shape, y_RO.shape[1], count_E.shape[0]
    blocks = fit_outer(blocks or outer_blocks_of(chip()), rows, inner, outer)
    height, columns = blocks.height, blocks.columns
    work = make_work(count_E, rows, blocks.rows, empty=True)

    n_columns, n_heights = blocks.outer // columns, blocks.inner // height

    def kernel(
        group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, y: Any, w: Any, total: Any, x_IR: Any, y_RO: Any
    ) -> None:
        s = pl.program_id(2)
        group = group_S[s]
        row = lax.broadcasted_iota(jnp.int32, (blocks.rows, 1), 0) + tile_S[s] * blocks.rows
        own = (row >= first_G[group]) & (row < end_G[group])
        before, after = group_S[jnp.maximum(s - 1, 0)], group_S[jnp.minimum(s + 1, work.group_S.shape[0] - 1)]
        first, last = (s == 0) | (before != group), after != group
        for i in range(n_heights):
            at = slice(i * height, (i + 1) * height)
            x_IR[at, :] = jnp.where(own, x[:, at], jnp.zeros((), x.dtype)).T
        y_RO[...] = jnp.where(own, y[...], jnp.zeros((), y.dtype))

        def place(i: Any) -> tuple[Any, Any]:
            start = pl.multiple_of(lax.div(i, n_columns) * height, height)
            return pl.ds(start, height), _columns(lax.rem(i, n_columns), columns)

        def add(i: Any, _: None) -> None:
            at = place(i)
            total[at] = jnp.where(first, 0.0, total[at]) + dot(x_IR[at[0], :], y_RO[:, at[1]], 1, 0)

        def store(i: Any, _: None) -> None:
            at = place(i)
            w[at] = total[at].astype(w.dtype)

        lax.fori_loop(0, n_heights * n_columns, add, None, unroll=blocks.unroll)
        pl.when(last)(lambda: lax.fori_loop(0, n_heights * n_columns, store, None))

    sums = result((n_groups, inner, outer), dtype, x_RI, interpret)
    call = pl.pallas_call(
        kernel,
        out_shape=sums,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer), work.size),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.inner), lambda i, j, s, group_S, tile_S, *_: (tile_S[s], i)),
                pl.BlockSpec((blocks.rows, blocks.outer), lambda i, j, s, group_S, tile_S, *_: (tile_S[s], j)),
            ],
            out_specs=pl.BlockSpec((None, blocks.inner, blocks.outer), lambda i, j, s, group_S, *_: (group_S[s], i, j)),
            scratch_shapes=[
                pltpu.VMEM((blocks.inner, blocks.outer), jnp.float32),
                pltpu.VMEM((blocks.inner, blocks.rows), x_RI.dtype),
                pltpu.VMEM((blocks.rows, blocks.outer), y_RO.dtype),
            ],
        ),
        compiler_params=_compiler(blocks, ("parallel", "parallel", "arbitrary")),
        cost_estimate=estimate(2 * rows * inner * outer, x_RI, y_RO, sums),
        name=name,
        interpret=interpret,
    )
    return call(*work[:4], x_RI, y_RO)


def _compiler(blocks: Blocks, dimensions: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=blocks.vmem_mib * MIB)


def _folded(values: jax.Array, width: int) -> jax.Array:
    """Every `width` columns, added up."""
    first, *others = (values[:, start : start + width] for start in range(0, values.shape[1], width))
    return sum(others, start=first)


def _cut(refs: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """In parts of these sizes, and the rest."""
    ends = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    return [*(refs[a:b] for a, b in zip(ends, ends[1:], strict=False)), refs[ends[-1] :]]


def _columns(i: Any, width: int) -> Any:
    start = i * width
    return pl.ds(pl.multiple_of(start, width) if width % LANES == 0 else start, width)


def _product(a: jax.Array, b: jax.Array, k: Any, inner: int, blocks: Blocks, transposed: bool) -> jax.Array:
    """Of the contraction's last block, what is within the operands."""
    axis = int(transposed)
    if inner % blocks.inner:
        left = inner - k * blocks.inner
        a, b = (
            jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, along) < left, v, jnp.zeros((), v.dtype))
            for v, along in ((a, 1), (b, axis))
        )
    return dot(a, b, 1, axis)
