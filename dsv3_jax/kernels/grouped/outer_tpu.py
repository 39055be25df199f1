"""The grouped outer product on TPU's matrix units, the gradient with respect to weights.

The grid walks blocks of a matrix, then the list of (group, tile of rows): a group's sum stays in VMEM until its last tile. Of a
tile in which a group begins or ends, parts with rows of it are multiplied; rows of others are selected away first, on both
sides, since 0 * NaN is NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped.blocks_tpu import OuterBlocks, fit_outer, outer_blocks_of
from dsv3_jax.kernels.grouped.grid_tpu import Place, call, walk, when
from dsv3_jax.kernels.grouped.work import make_work
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import dot, estimate


def outer_products(
    x_RI: jax.Array,
    y_RO: jax.Array,
    count_E: jax.Array,
    *,
    dtype: Any,
    name: str,
    interpret: Any,
    blocks: OuterBlocks | None = None,
) -> jax.Array:
    """As `call.OuterProducts`."""
    (rows, inner), outer, n_groups = x_RI.shape, y_RO.shape[1], count_E.shape[0]
    blocks = blocks or outer_blocks_of(chip())
    if x_RI.dtype == jnp.float32:
        blocks = blocks._replace(inner=blocks.inner // 2)
    blocks = fit_outer(blocks, rows, inner, outer)
    work = make_work(count_E, rows, blocks.rows, empty=True)

    def kernel(group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, y: Any, w: Any, total: Any, *turned: Any) -> None:
        s = pl.program_id(2)
        group = group_S[s]
        before, after = group_S[jnp.maximum(s - 1, 0)], group_S[jnp.minimum(s + 1, work.group_S.shape[0] - 1)]
        opens, closes, empty = (s == 0) | (before != group), after != group, first_G[group] == end_G[group]
        first = jnp.maximum(first_G[group] - tile_S[s] * blocks.rows, 0)
        end = jnp.minimum(end_G[group] - tile_S[s] * blocks.rows, blocks.rows)
        whole = end - first == blocks.rows

        def add(fresh: Any, x_RI: jax.Array, y_RO: jax.Array) -> None:
            for x_IR in turned:
                x_IR[:, : x_RI.shape[0]] = x_RI.T
            product = dot(turned[0][:, : x_RI.shape[0]], y_RO) if turned else dot(x_RI, y_RO, 0, 0)
            total[...] = jnp.where(fresh, 0.0, total[...]) + product

        def add_all(_: Any, __: None) -> None:
            add(opens, x[...], y[...])

        def add_own(at: Place) -> None:
            row = lax.broadcasted_iota(jnp.int32, (at.height, 1), 0) + at.row
            own = (row >= first) & (row < end)
            parts = (jnp.where(own, v[pl.ds(at.row, at.height), :], jnp.zeros((), v.dtype)) for v in (x, y))
            add(opens & (at.row <= first), *parts)

        def store(_: Any, __: None) -> None:
            w[...] = total[...].astype(w.dtype)

        def clear(_: Any, __: None) -> None:
            w[...] = jnp.zeros(w.shape, w.dtype)

        when(whole, add_all)
        walk(first, jnp.where(whole, first, end), blocks.pieces, 1, add_own)
        when(closes & ~empty, store)
        when(empty, clear)

    sums = result((n_groups, inner, outer), dtype, x_RI, interpret)
    ins = [
        pl.BlockSpec((blocks.rows, blocks.inner), lambda i, j, s, group_S, tile_S, *_: (tile_S[s], i)),
        pl.BlockSpec((blocks.rows, blocks.outer), lambda i, j, s, group_S, tile_S, *_: (tile_S[s], j)),
    ]
    out = pl.BlockSpec((None, blocks.inner, blocks.outer), lambda i, j, s, group_S, *_: (group_S[s], i, j))
    (found,) = call(
        kernel,
        (pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer), work.size),
        ("parallel", "parallel", "arbitrary"),
        (work[:4], [x_RI, y_RO], [sums]),
        (ins, [out]),
        [
            pltpu.VMEM((blocks.inner, blocks.outer), jnp.float32),
            *[pltpu.VMEM((blocks.inner, blocks.rows), x_RI.dtype)] * blocks.turns,
        ],
        streamed=blocks.streamed,
        vmem_mib=blocks.vmem_mib,
        cost_estimate=estimate(2 * rows * inner * outer, x_RI, y_RO, sums),
        name=name,
        interpret=interpret,
    )
    return found
