"""Attention's forward step with scores [keys, queries], for matrix units that hold 256 columns: a value's 128 would fill half.

Sums are [width, queries]: what the units hold is weights of 256 queries, what streams past them the values. A maximum is then
one of many along lanes, and found without a move between lanes. An iteration is a tile of keys with a piece of the block's
queries, which all see the tile or are on the diagonal. It makes the next iteration's scores, be they of the next piece, while
the vector units have the softmax of its own, in the other of two buffers. Which one is which is static in each of two copies of
the code: the compiler lets a store pass a load only where it knows both addresses.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.attention.call import LOG2E, Operands
from dsv3_jax.kernels.attention.step_tpu import Ins, Step, beside, column_of, reset, wide
from dsv3_jax.kernels.tiles import LANES, SUBLANES, dot


class Kept(NamedTuple):
    """Results, and what stays in VMEM; two buffers of scores with their columns' maxima; queries across, [width, queries]."""

    out: Any
    lse: Any
    most: Any
    total: Any
    sums: Any
    scores: Any
    weights: Any
    peaks: Any
    across: Any
    across_rope: Any


class At(NamedTuple):
    """An iteration: a piece of the queries, and a tile of keys."""

    piece: Any
    tile: Any


def scratch(step: Step, operands: Operands) -> list[Any]:
    of_queries = (1, step.queries), (SUBLANES, step.queries), (step.width, step.queries)
    q, q_rope = operands.q_content_BHTC, operands.q_rope_BHTR
    return [
        *(pltpu.VMEM(shape, jnp.float32) for shape in (*of_queries, (2, step.tile, step.height))),
        pltpu.VMEM((step.tile, step.height), operands.v_BHSW.dtype),
        pltpu.VMEM((2, SUBLANES, step.height), jnp.float32),
        *(pltpu.VMEM((x.shape[-1], step.queries), x.dtype) for x in (q, q_rope)),
    ]


def start(ins: Ins, kept: Kept) -> None:
    reset(kept)
    kept.across[...], kept.across_rope[...] = ins.q[...].T, ins.q_rope[...].T  # once: the units take them faster so


def walk(step: Step, ins: Ins, kept: Kept, i: Any, j: Any) -> None:
    """Of block i of queries all tiles of block j of keys that one of them sees."""
    first, height = step.first(i, j), step.height
    pieces = jnp.minimum(step.queries // height, pl.cdiv(step.length - i * step.queries, height))
    lowest = lax.div(jnp.maximum(-first, 0), height)  # the first piece that sees one of the keys

    @pl.when(lowest < pieces)
    def begin() -> None:
        for left in range(0, height, step.columns):
            _ahead(step, ins, kept, 0, At(lowest, 0), slice(left, min(left + step.columns, height)))

    def piece(c: Any, slot: Any) -> Any:
        whole, some = step.tiles_of(first + c * height, height)

        def iteration(diagonal: bool, t: Any, slot: Any) -> Any:
            after = t + 1 < some
            then = At(jnp.where(after, c, jnp.minimum(c + 1, pieces - 1)), jnp.where(after, t + 1, 0))
            for n in range(2):
                pl.when(slot == n)(partial(_add, step, ins, kept, first, n, diagonal, At(c, t), then))
            return 1 - slot

        slot = lax.fori_loop(0, whole, partial(iteration, False), slot)
        return lax.fori_loop(whole, some, partial(iteration, True), slot)

    lax.fori_loop(lowest, pieces, piece, 0)


def _ahead(step: Step, ins: Ins, kept: Kept, slot: int, it: At, at: slice) -> None:
    """Scores of an iteration's keys with some of its queries."""
    queries, highest = pl.ds(pl.multiple_of(it.piece * step.height + at.start, LANES), at.stop - at.start), []
    for top in range(0, step.tile, step.part):
        keys = pl.ds(pl.multiple_of(it.tile * step.tile + top, LANES), step.part)
        both = jnp.concatenate([kept.across[:, queries], kept.across_rope[:, queries]], axis=0)
        s = dot(beside(ins.k[keys, :], ins.k_rope[keys, :]), both, 1, 0)
        kept.scores[slot, top : top + step.part, at] = s
        highest.append(s.reshape(-1, SUBLANES, s.shape[1]).max(axis=0))
    kept.peaks[slot, :, at] = reduce(jnp.maximum, highest)


def _add(step: Step, ins: Ins, kept: Kept, first: Any, slot: int, diagonal: bool, it: At, then: At) -> None:
    """The iteration's scores are there; on the diagonal not every query sees each of the keys. `then`: the next iteration."""
    tile, height, scores, weights, segments = step.tile, step.height, kept.scores, kept.weights, ins.own is not None
    square = height == tile and step.offset % tile == 0  # the one tile on the diagonal begins with the first query
    for left in range(0, height, step.columns):
        at = slice(left, min(left + step.columns, height))
        of, size = pl.ds(pl.multiple_of(it.piece * height + left, LANES), at.stop - left), at.stop - left
        keys = at.stop if diagonal and square else tile  # that one of the queries sees
        hidden = slice(left if square and not segments else 0, keys)  # from some
        shape, seen = (keys - hidden.start, size), []
        if diagonal:
            query = lax.broadcasted_iota(jnp.int32, shape, 1) + (first + it.piece * height + left)
            seen += [lax.broadcasted_iota(jnp.int32, shape, 0) + (it.tile * tile + hidden.start) <= query]
        if segments:
            of_key = column_of(ins.others[:, pl.ds(pl.multiple_of(it.tile * tile, LANES), keys)])
            seen += [wide(of_key, size) == jnp.broadcast_to(ins.own[:, of], shape)]
        if seen:
            scores[slot, hidden, at] = jnp.where(reduce(jnp.logical_and, seen), scores[slot, hidden, at], -jnp.inf)
            kept.peaks[slot, :, at] = scores[slot, :keys, at].reshape(-1, SUBLANES, size).max(axis=0)
        before = kept.most[:, of]
        peak = jnp.maximum(before, kept.peaks[slot, :, at].max(axis=0, keepdims=True))
        shrunk, more = jnp.exp2((before - peak) * (step.scale * LOG2E)), jnp.zeros((SUBLANES, size), jnp.float32)
        kept.most[:, of] = peak
        for row in range(0, keys, step.chunk):
            rows = slice(row, row + step.chunk)
            # Scaled after the peak is taken off: else scaled scores wait for the peak, and are spilled.
            p = jnp.exp2((scores[slot, rows, at] - peak) * (step.scale * LOG2E))
            more += p.reshape(-1, SUBLANES, size).sum(axis=0)
            weights[rows, at] = p.astype(weights.dtype)
        kept.total[:, of] = kept.total[:, of] * shrunk + more
        kept.sums[:, of] = kept.sums[:, of] * shrunk
        _ahead(step, ins, kept, 1 - slot, then, at)
        values = ins.v[pl.ds(pl.multiple_of(it.tile * tile, LANES), keys), :]
        kept.sums[:, of] += dot(values, weights[:keys, at], 0, 0)


def finish(step: Step, kept: Kept) -> None:
    all_rows = kept.total[...].sum(axis=0, keepdims=True)
    none = all_rows == 0  # of padding
    all_rows = jnp.where(none, 1.0, all_rows)
    kept.out[...] = (kept.sums[...] / all_rows).T.astype(kept.out.dtype)
    kept.lse[...] = jnp.where(none, 0.0, kept.most[...] * step.scale + jnp.log(all_rows))
