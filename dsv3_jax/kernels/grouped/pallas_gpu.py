"""The grouped products on GPU's tensor cores, through Triton.

A program takes a block of columns and one entry of the list of (group, tile of rows), and writes the rows of its group alone:
each row is written once. Operands whose sides are no multiples of the blocks are padded first, so that no load is guarded.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dsv3_jax.kernels.grouped.call import PARTIAL, Epilogue, Out
from dsv3_jax.kernels.grouped.work import make_work
from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.tiles import dot, padded


class Blocks(NamedTuple):
    """Of a product [R, I] x [I, O]: rows, channels of the contraction, columns; powers of two, as Triton has it."""

    rows: int
    inner: int
    outer: int
    warps: int
    stages: int


# The fastest on an H200, as in the other kernels; float32 is multiplied outside the tensor cores, and takes twice the shared
# memory. By the bytes of a number; then up to how many results and operands beside the product, that registers hold at the end.
PRODUCTS = {
    2: {2: Blocks(128, 64, 256, 8, 4), 4: Blocks(128, 64, 128, 8, 3), 7: Blocks(128, 64, 64, 8, 4)},
    4: {2: Blocks(64, 32, 64, 4, 2), 7: Blocks(64, 32, 64, 8, 2)},
}
OUTER = {2: Blocks(64, 128, 256, 8, 3), 4: Blocks(32, 64, 64, 4, 2)}


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
) -> tuple[jax.Array, ...]:
    """As `call.Products`."""
    (rows, inner), n_groups, blocks = x_RI.shape, weights[0].shape[0], _blocks_of(x_RI, len(outs) + len(extras))
    outer = weights[0].shape[1 if transposed else 2]
    x_RI = _fill(x_RI, blocks.rows, blocks.inner)
    sides = (blocks.outer, blocks.inner) if transposed else (blocks.inner, blocks.outer)
    weights = [_fill(w, *sides) for w in weights]
    narrow = [v.shape[1] < outer for v in extras]
    extras = [_fill(v, blocks.rows, 1 if one else blocks.outer) for v, one in zip(extras, narrow, strict=True)]
    height, n_outer, n_inner = x_RI.shape[0], pl.cdiv(outer, blocks.outer), pl.cdiv(inner, blocks.inner)
    none = height - count_E.sum(dtype=jnp.int32)  # a last group without weights, so that every row belongs to one
    work = make_work(jnp.append(count_E, none), height, blocks.rows)
    widths = [min(PARTIAL, blocks.outer) if out.partial else blocks.outer for out in outs]

    def kernel(group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, *refs: Any) -> None:
        ws, more, ys = refs[: len(weights)], refs[len(weights) : len(weights) + len(extras)], refs[-len(outs) :]
        j, s = pl.program_id(0), pl.program_id(1)
        group = group_S[s]

        @pl.when(group <= n_groups)  # behind the list's end there is nothing
        def entry() -> None:
            row = tile_S[s] * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32)
            own = ((row >= first_G[group]) & (row < end_G[group]))[:, None]
            rows_at, at, matrix = _at(tile_S[s], blocks.rows), _at(j, blocks.outer), jnp.minimum(group, n_groups - 1)

            def add(k: Any, totals: Any) -> Any:
                a, k_at = x[rows_at, _at(k, blocks.inner)], _at(k, blocks.inner)
                pieces = [w[matrix, at, k_at].T if transposed else w[matrix, k_at, at] for w in ws]
                return tuple(total + dot(a, b) for total, b in zip(totals, pieces, strict=True))

            zeros = tuple(jnp.zeros((blocks.rows, blocks.outer), jnp.float32) for _ in ws)
            last = lax.select(group < n_groups, jnp.int32(n_inner), jnp.int32(0))  # of one type, as Triton's loops want
            totals = lax.fori_loop(jnp.int32(0), last, add, zeros)
            sides = [slice(None) if one else at for one in narrow]
            beside = [v[rows_at, side].astype(jnp.float32) for v, side in zip(more, sides, strict=True)]
            for y, value, width in zip(ys, epilogue(totals, beside), widths, strict=True):
                value = value.reshape(blocks.rows, blocks.outer // width, width).sum(axis=1)
                value = jnp.where(group < n_groups, value, 0.0).astype(y.dtype)
                plgpu.store(y.at[rows_at, _at(j, width)], value, mask=jnp.broadcast_to(own, value.shape))

    call = pl.pallas_call(
        kernel,
        out_shape=[result((height, n_outer * w), out.dtype, x_RI, interpret) for w, out in zip(widths, outs, strict=True)],
        grid=(n_outer, work.group_S.shape[0]),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name=name,
        interpret=interpret,
    )
    found = call(*work[:4], x_RI, *weights, *extras)
    return tuple(y[:rows] if out.partial else y[:rows, :outer] for y, out in zip(found, outs, strict=True))


def outer_products(x_RI: jax.Array, y_RO: jax.Array, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any) -> jax.Array:
    """As `call.OuterProducts`."""
    (_, inner), outer, n_groups, blocks = x_RI.shape, y_RO.shape[1], count_E.shape[0], OUTER[x_RI.dtype.itemsize]
    x_RI, y_RO = _fill(x_RI, blocks.rows, blocks.inner), _fill(y_RO, blocks.rows, blocks.outer)
    end_E = jnp.cumsum(count_E, dtype=jnp.int32)
    n_inner, n_outer = x_RI.shape[1] // blocks.inner, y_RO.shape[1] // blocks.outer

    def kernel(first_E: Any, end_E: Any, x: Any, y: Any, w: Any) -> None:
        i_at, o_at, group = _at(pl.program_id(0), blocks.inner), _at(pl.program_id(1), blocks.outer), pl.program_id(2)
        first, end = first_E[group], end_E[group]

        def add(tile: Any, total: Any) -> Any:
            at = _at(tile, blocks.rows)
            return total + dot(x[at, i_at].T, y[at, o_at])

        def add_own(tile: Any, total: Any) -> Any:
            row = tile * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32)
            own, at = ((row >= first) & (row < end))[:, None], _at(tile, blocks.rows)
            a, b = (jnp.where(own, v[at, side], jnp.zeros((), v.dtype)) for v, side in ((x, i_at), (y, o_at)))
            return total + dot(a.T, b)

        # Only the first and the last tile hold rows of others; a loop without selects goes from memory to the tensor cores.
        begin, stop = lax.div(first, blocks.rows), lax.div(end + blocks.rows - 1, blocks.rows)
        whole = jnp.minimum(lax.div(first + blocks.rows - 1, blocks.rows), stop)
        rest = jnp.maximum(lax.div(end, blocks.rows), whole)
        total = lax.fori_loop(begin, whole, add_own, jnp.zeros((blocks.inner, blocks.outer), jnp.float32))
        total = lax.fori_loop(rest, stop, add_own, lax.fori_loop(whole, rest, add, total))
        w[group, i_at, o_at] = total.astype(w.dtype)

    call = pl.pallas_call(
        kernel,
        out_shape=result((n_groups, n_inner * blocks.inner, n_outer * blocks.outer), dtype, x_RI, interpret),
        grid=(n_inner, n_outer, n_groups),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name=name,
        interpret=interpret,
    )
    return call(end_E - count_E, end_E, x_RI, y_RO)[:, :inner, :outer]


def _blocks_of(x: jax.Array, beside: int) -> Blocks:
    return next(blocks for most, blocks in PRODUCTS[x.dtype.itemsize].items() if beside <= most)


def _at(i: Any, size: int) -> Any:
    return pl.ds(i * size, size)


def _fill(x: jax.Array, rows: int, columns: int) -> jax.Array:
    return padded(padded(x, rows), columns, -1)
