"""Attention's forward step with scores [queries, keys].

A loop over tiles of keys makes scores of all the block's queries, so that many rows stream past each key that the matrix units
hold, and an online softmax in base 2 goes over them in chunks of a few rows. Its maxima are kept in all lanes, its sums in each
lane for itself.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.attention.call import LN2, LOG2E, Operands
from dsv3_jax.kernels.attention.step_tpu import Ins, Step, beside, column_of, reset, wide
from dsv3_jax.kernels.tiles import LANES, dot


class Kept(NamedTuple):
    """Results, and what stays in VMEM from step to step; the queries' documents as a column, if there are any."""

    out: Any
    lse: Any
    most: Any
    total: Any
    sums: Any
    scores: Any
    weights: Any
    document: Any = None


def scratch(step: Step, operands: Operands) -> list[Any]:
    lanes, block = (step.queries, LANES), (step.queries, step.tile)
    shapes = lanes, lanes, (step.queries, step.width), block
    wanted = [pltpu.VMEM(shape, jnp.float32) for shape in shapes] + [pltpu.VMEM(block, operands.v_BHSW.dtype)]
    return wanted + [pltpu.VMEM(lanes, jnp.int32)] * (operands.segments_BS is not None)


def start(ins: Ins, kept: Kept) -> None:
    reset(kept)
    if kept.document is not None:
        kept.document[...] = column_of(ins.own[...])


def walk(step: Step, ins: Ins, kept: Kept, i: Any, j: Any) -> None:
    """Of block i of queries all tiles of block j of keys that one of them sees."""
    first = step.first(i, j)
    whole, _ = step.tiles_of(first, step.queries)
    lax.fori_loop(0, whole, partial(_add, step, ins, kept, first, 0, step.queries, False), None)
    for top in range(0, step.queries, step.height):
        _, some = step.tiles_of(first + top, step.height)
        lax.fori_loop(whole, some, partial(_add, step, ins, kept, first, top, step.height, True), None)


def _add(step: Step, ins: Ins, kept: Kept, first: Any, top: int, height: int, diagonal: bool, t: Any, _: None) -> None:
    """Keys of tile t to `height` queries from `top` on; on the diagonal not every query sees each of the keys."""
    tile, scores, weights = step.tile, kept.scores, kept.weights
    of_rows, of_tile = slice(top, top + height), pl.ds(pl.multiple_of(t * tile, tile), tile)
    queries = beside(ins.q[of_rows, :], ins.q_rope[of_rows, :])
    for part in range(0, tile, step.columns):
        size = min(step.columns, tile - part)
        at = pl.ds(pl.multiple_of(t * tile + part, LANES), size)
        scores[of_rows, part : part + size] = dot(queries, beside(ins.k[at, :], ins.k_rope[at, :]), 1, 1)
    for row in range(top, top + height, step.chunk):
        at, shape, seen = slice(row, row + step.chunk), (step.chunk, tile), []
        if diagonal:
            query = lax.broadcasted_iota(jnp.int32, shape, 0) + (first + row)
            seen += [lax.broadcasted_iota(jnp.int32, shape, 1) + t * tile <= query]
        if kept.document is not None:
            seen += [wide(kept.document[at, :], tile) == jnp.broadcast_to(ins.others[:, of_tile], shape)]
        s = scores[at, :] * (step.scale * LOG2E)
        s = jnp.where(reduce(jnp.logical_and, seen), s, -jnp.inf) if seen else s
        before = kept.most[at, :]
        peak = jnp.maximum(before, s.max(axis=1, keepdims=True))
        p, shrunk = jnp.exp2(s - wide(peak, tile)), jnp.exp2(before - peak)
        kept.most[at, :] = peak
        kept.total[at, :] = kept.total[at, :] * shrunk + sum(p[:, c : c + LANES] for c in range(0, tile, LANES))
        weights[at, :] = p.astype(weights.dtype)
        kept.sums[at, :] = kept.sums[at, :] * wide(shrunk, step.width)
    kept.sums[of_rows, :] += dot(weights[of_rows, :], ins.v[of_tile, :], 1, 0)


def finish(step: Step, kept: Kept) -> None:
    all_lanes = jnp.broadcast_to(kept.total[...].sum(axis=1, keepdims=True), kept.total.shape)
    none = all_lanes == 0  # of padding
    all_lanes = jnp.where(none, 1.0, all_lanes)
    kept.out[...] = (kept.sums[...] / wide(all_lanes, step.width)).astype(kept.out.dtype)
    kept.lse[...] = jnp.where(none, 0.0, kept.most[...] * LN2 + jnp.log(all_lanes)).T[:1, :]
