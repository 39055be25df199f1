"""The scaled products on GPU's tensor cores, through Triton.

A program takes a block of columns and one entry of the list of (group, tile of rows), as in `kernels.grouped`. Each step of its
loop multiplies one tile of the contraction and adds the scaled sum to registers. The tile becomes float16, exactly, on its way
from memory: of FP8 operands Triton, as JAX lowers to it, makes sm_80's instruction in float16, of float16 ones sm_90's.
Operands whose sides are no multiples of the blocks are padded, so that no load is guarded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dsv3_jax.kernels.grouped.work import make_work
from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.scaled.call import SIDE, Tiled
from dsv3_jax.kernels.tiles import dot, estimate, padded


class Blocks(NamedTuple):
    """Rows and columns of a program, powers of two; columns divide SIDE, so that they share the weights' scale."""

    rows: int
    outer: int
    warps: int
    stages: int


PRODUCTS = Blocks(128, 64, 4, 3)
OUTER = Blocks(64, 128, 4, 3)


def products(a: Tiled, b: Tiled, count_E: jax.Array, *, transposed: bool, dtype: Any, name: str, interpret: Any) -> jax.Array:
    """As `call.Products`."""
    (x_RI, x_scale), (w, w_scale) = a, b
    (rows, inner), n_groups, blocks = x_RI.shape, w.shape[0], PRODUCTS
    outer, n_inner = w.shape[1 if transposed else 2], inner // SIDE
    x_RI, x_scale = padded(x_RI, blocks.rows), padded(x_scale, blocks.rows)
    w = padded(w, blocks.outer, -2 if transposed else -1)
    height, n_outer = x_RI.shape[0], pl.cdiv(outer, blocks.outer)
    none = height - count_E.sum(dtype=jnp.int32)  # a last group without weights, so that every row belongs to one
    work = make_work(jnp.append(count_E, none), height, blocks.rows)

    def kernel(
        group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, x_scales: Any, w: Any, w_scales: Any, y: Any
    ) -> None:
        j, s = pl.program_id(0), pl.program_id(1)
        group = group_S[s]

        @pl.when(group <= n_groups)  # behind the list's end there is nothing
        def entry() -> None:
            row = tile_S[s] * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32)
            own = ((row >= first_G[group]) & (row < end_G[group]))[:, None]
            rows_at, at, matrix = _at(tile_S[s], blocks.rows), _at(j, blocks.outer), jnp.minimum(group, n_groups - 1)
            column = lax.div(j * blocks.outer, SIDE)

            def add(t: Any, total: Any) -> Any:
                inner_at = _at(t, SIDE)
                b = w[matrix, at, inner_at].T if transposed else w[matrix, inner_at, at]
                scale = w_scales[matrix, column, t] if transposed else w_scales[matrix, t, column]
                return total + _product(x[rows_at, inner_at], b) * (x_scales[rows_at, t] * scale)[:, None]

            zeros = jnp.zeros((blocks.rows, blocks.outer), jnp.float32)
            total = lax.fori_loop(jnp.int32(0), jnp.where(group < n_groups, jnp.int32(n_inner), jnp.int32(0)), add, zeros)
            plgpu.store(y.at[rows_at, at], total.astype(y.dtype), mask=jnp.broadcast_to(own, total.shape))

    y = result((height, n_outer * blocks.outer), dtype, x_RI, interpret)
    call = pl.pallas_call(
        kernel,
        out_shape=y,
        grid=(n_outer, work.group_S.shape[0]),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=estimate(2 * rows * inner * outer, x_RI, x_scale, w, w_scale, y),
        name=name,
        interpret=interpret,
    )
    return call(*work[:4], x_RI, x_scale, w, w_scale)[:rows, :outer]


def outer_products(a: Tiled, b: Tiled, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any) -> jax.Array:
    """As `call.OuterProducts`."""
    (x_IR, x_scale), (y_RO, y_scale) = a, b
    (inner, rows), outer, n_groups, blocks = x_IR.shape, y_RO.shape[1], count_E.shape[0], OUTER
    x_IR, x_scale = padded(x_IR, blocks.rows), padded(x_scale, blocks.rows)
    y_RO, y_scale = padded(y_RO, blocks.outer, -1), padded(y_scale, blocks.outer, -1)
    end_E = jnp.cumsum(count_E, dtype=jnp.int32)
    n_inner, n_outer = x_IR.shape[0] // blocks.rows, y_RO.shape[1] // blocks.outer

    def kernel(first_E: Any, end_E: Any, x: Any, x_scales: Any, y: Any, y_scales: Any, w: Any) -> None:
        i_at, o_at, group = _at(pl.program_id(0), blocks.rows), _at(pl.program_id(1), blocks.outer), pl.program_id(2)

        def add(t: Any, total: Any) -> Any:
            at = _at(t, SIDE)
            sum_ = _product(x[i_at, at], y[at, o_at])
            return total + sum_ * x_scales[i_at, t][:, None] * y_scales[t, o_at][None, :]

        tiles = lax.div(first_E[group], SIDE), lax.div(end_E[group], SIDE)
        total = lax.fori_loop(*tiles, add, jnp.zeros((blocks.rows, blocks.outer), jnp.float32))
        w[group, i_at, o_at] = total.astype(w.dtype)

    sums = result((n_groups, n_inner * blocks.rows, n_outer * blocks.outer), dtype, x_IR, interpret)
    call = pl.pallas_call(
        kernel,
        out_shape=sums,
        grid=(n_inner, n_outer, n_groups),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=estimate(2 * rows * inner * outer, x_IR, x_scale, y_RO, y_scale, sums),
        name=name,
        interpret=interpret,
    )
    return call(end_E - count_E, end_E, x_IR, x_scale, y_RO, y_scale)[:, :inner, :outer]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return dot(a.astype(jnp.float16), b.astype(jnp.float16))  # which hold every e4m3 and e5m2, and cost one conversion


def _at(i: Any, size: int) -> Any:
    return pl.ds(i * size, size)
