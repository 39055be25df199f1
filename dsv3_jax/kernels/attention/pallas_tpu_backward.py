"""Attention for MLA on TPU's matrix units: the backward pass.

One kernel makes all gradients, from scores that it computes once; one for the queries' and one for the keys' would do so twice.
The grid walks blocks of keys, and for each of them the blocks of queries from the diagonal on. The keys' gradients collect over
one such walk, the queries' over all of a head, in VMEM; a block of them is complete at the diagonal. The rotary key's collect
over heads. A tile of scores stands on its side, [keys, queries], so that all products but the queries' gradients contract as
they lie, and those with the key on its side, which is turned once a walk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.attention.call import LOG2E, Operands, cost_of, rows_of_segments
from dsv3_jax.kernels.attention.pallas_tpu import beside, wide
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import LANES, MIB, dot, padded, up


class Blocks(NamedTuple):
    """Queries, and keys, in VMEM; of one iteration; rows of one chunk of the softmax; queries whose gradients fit VMEM."""

    block: int = 1024
    tile: int = 512
    chunk: int = 32
    span: int = 32768
    vmem_mib: int = 60
    columns: int = LANES  # queries of one product


# What needed the fewest bundles, see `experiments.bench_kernels`; other chips as v5p.
BLOCKS = Blocks(columns=256)
BLOCKS_OF_CHIP = dict.fromkeys(("TPU v6 lite", "TPU7x"), Blocks(columns=512))


def backward(
    operands: Operands,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    d_out_BHTW: jax.Array,
    *,
    interpret: Any,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, ...]:
    """As `call.Backward`."""
    q, q_rope, k, k_rope, v, segments_BS, scale = operands
    (B, H, T, C), (S, W), R = q.shape, v.shape[2:], q_rope.shape[3]
    blocks = blocks or BLOCKS_OF_CHIP.get(chip(), BLOCKS)
    if T > blocks.span:
        return _in_spans(operands, lse_BHT, delta_BHT, d_out_BHTW, interpret, blocks)
    tile = min(blocks.tile, up(S, LANES))
    block = min(blocks.block, up(S, tile))
    assert block % tile == 0 and tile % blocks.chunk == 0
    q, q_rope, d_out = (padded(x, block) for x in (q, q_rope, d_out_BHTW))
    k, k_rope, v = (padded(x, block) for x in (k, k_rope, v))
    lse, delta = (padded(x, block, -1)[:, :, None, :] for x in (lse_BHT * LOG2E, delta_BHT))
    offset, tiles, n_T, n_S = S - T, block // tile, q.shape[2] // block, k.shape[2] // block
    segments = [] if segments_BS is None else rows_of_segments(segments_BS, offset, block, block)
    cores = 2 - H % 2  # heads whose rotary gradients collect apart: two cores of a chip share nothing
    heads = H // cores

    def first_of(j: Any) -> Any:
        """The first block of queries that sees a key of block j; all before it are complete."""
        return lax.div(jnp.maximum(j * block - offset, 0), block)

    def kernel(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any, lse: Any, delta: Any, d_out: Any, *refs: Any) -> None:
        (own, others), refs = (refs[:2], refs[2:]) if segments else ((None, None), refs)
        outs, refs = refs[:5], refs[5:]
        dq_all, dk_sum, dk_rope_all, dv_sum, k_across, scores, d_weights, weights, d_scores, *others_column = refs
        h, j, i = (pl.program_id(axis) for axis in (2, 3, 4))
        of_block = pl.ds(pl.multiple_of(i * block, block), block)
        of_keys = pl.ds(pl.multiple_of(j * block, block), block)

        @pl.when(i == first_of(j))
        def start_keys() -> None:
            dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
            dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)
            k_across[:C, :] = k[...].T
            k_across[C:, :] = k_rope[...].T
            for column in others_column:
                column[...] = jnp.broadcast_to(others[...], (LANES, block)).T

        @pl.when((i == first_of(j)) & (h == 0))
        def start_rope() -> None:
            dk_rope_all[of_keys, :] = jnp.zeros((block, R), jnp.float32)

        @pl.when(j == 0)
        def start_queries() -> None:
            dq_all[:, of_block] = jnp.zeros((C + R, block), jnp.float32)

        def add(keys: Any, masked: bool, b: Any, _: None) -> None:
            of_q_all = pl.ds(pl.multiple_of(i * block + b * tile, tile), tile)
            of_k, of_q = (pl.ds(pl.multiple_of(n * tile, tile), tile) for n in (keys, b))
            keys_ = beside(k[of_k, :], k_rope[of_k, :])
            for part in range(0, tile, blocks.columns):
                size = min(blocks.columns, tile - part)
                at, to = pl.ds(pl.multiple_of(b * tile + part, LANES), size), slice(part, part + size)
                scores[:, to] = dot(keys_, beside(q[at, :], q_rope[at, :]), 1, 1)
                d_weights[:, to] = dot(v[of_k, :], d_out[at, :], 1, 1)
            for first in range(0, tile, blocks.chunk):
                at, shape = slice(first, first + blocks.chunk), (blocks.chunk, tile)
                p = jnp.exp2(scores[at, :] * (scale * LOG2E) - lse[:, of_q])
                if masked:
                    key = lax.broadcasted_iota(jnp.int32, shape, 0) + (j * block + keys * tile + first)
                    seen = key <= lax.broadcasted_iota(jnp.int32, shape, 1) + (offset + i * block + b * tile)
                    for column in others_column:
                        rows = pl.ds(pl.multiple_of(keys * tile + first, blocks.chunk), blocks.chunk)
                        seen = seen & (wide(column[rows, :], tile) == jnp.broadcast_to(own[:, of_q], shape))
                    p = jnp.where(seen, p, 0.0)
                weights[at, :] = p.astype(weights.dtype)
                d_scores[at, :] = (p * (d_weights[at, :] - delta[:, of_q])).astype(d_scores.dtype)
            dv_sum[of_k, :] += dot(weights[...], d_out[of_q, :], 1, 0)
            dk_sum[of_k, :] += dot(d_scores[...], beside(q[of_q, :], q_rope[of_q, :]), 1, 0)
            dq_all[:, of_q_all] += dot(k_across[:, of_k], d_scores[...], 1, 0)

        def add_keys(keys: Any, _: None) -> None:
            behind = j * block + keys * tile - offset - i * block  # the tile's first key, counted from the first query
            first, whole = (jnp.clip(lax.div(jnp.maximum(n, 0), tile), 0, tiles) for n in (behind, behind + 2 * tile - 2))
            if segments:
                return lax.fori_loop(first, tiles, partial(add, keys, True), None)
            # Queries from the tile's last key on see all of it: there nothing is compared.
            lax.fori_loop(first, whole, partial(add, keys, True), None)
            lax.fori_loop(whole, tiles, partial(add, keys, False), None)

        pl.when(i >= first_of(j))(lambda: lax.fori_loop(0, tiles, add_keys, None))
        dq, dq_rope, dk, dk_rope, dv = outs

        @pl.when(j == lax.div(jnp.minimum(offset + (i + 1) * block, S) - 1, block))
        def finish_queries() -> None:
            both = (dq_all[:, of_block] * scale).T
            dq[...] = both[:, :C].astype(dq.dtype)
            dq_rope[...] = both[:, C:].astype(dq_rope.dtype)

        @pl.when(i == n_T - 1)
        def finish_keys() -> None:
            dk[...] = (dk_sum[:, :C] * scale).astype(dk.dtype)
            dk_rope_all[of_keys, :] += dk_sum[:, C:]
            dv[...] = dv_sum[...].astype(dv.dtype)

        @pl.when((i == n_T - 1) & (h == heads - 1))
        def finish_rope() -> None:
            dk_rope[...] = dk_rope_all[of_keys, :] * scale

    def head(c: Any, h: Any) -> Any:
        return c * heads + h

    def of_query(b: Any, c: Any, h: Any, j: Any, i: Any) -> Any:
        return b, head(c, h), jnp.maximum(i, first_of(j)), 0  # blocks before the diagonal: its own, which is needed next

    def of_key(b: Any, c: Any, h: Any, j: Any, i: Any) -> Any:
        return b, head(c, h), j, 0

    def along(b: Any, c: Any, h: Any, j: Any, i: Any) -> Any:
        return b, head(c, h), 0, jnp.maximum(i, first_of(j))

    def complete(b: Any, c: Any, h: Any, j: Any, i: Any) -> Any:
        """Of the blocks of queries that are complete after keys j, the current one."""
        first, behind = first_of(j), jnp.where(j == n_S - 1, n_T, first_of(j + 1))
        return b, head(c, h), jnp.clip(i, first, jnp.maximum(first, behind - 1)), 0

    def last_head(b: Any, c: Any, h: Any, j: Any, i: Any) -> Any:
        return b, c, jnp.where(h == heads - 1, j, 0), 0

    side = (None, None)
    specs = {width: pl.BlockSpec((*side, block, width), of_query) for width in (C, R, W)}
    dq, dq_rope, dk, dk_rope, dv = pl.pallas_call(
        kernel,
        out_shape=[
            result(q.shape, q.dtype, q, interpret),
            result(q_rope.shape, q.dtype, q, interpret),
            result(k.shape, k.dtype, q, interpret),
            result((B, cores, *k_rope.shape[1:]), jnp.float32, q, interpret),
            result(v.shape, v.dtype, q, interpret),
        ],
        grid=(B, cores, heads, n_S, n_T),
        in_specs=[
            specs[C],
            specs[R],
            pl.BlockSpec((*side, block, C), of_key),
            pl.BlockSpec((None, block, R), lambda b, c, h, j, i: (b, j, 0)),
            pl.BlockSpec((*side, block, W), of_key),
            pl.BlockSpec((*side, 1, block), along),
            pl.BlockSpec((*side, 1, block), along),
            specs[W],
            *[
                pl.BlockSpec((None, 1, block), lambda b, c, h, j, i: (b, 0, jnp.maximum(i, first_of(j)))),
                pl.BlockSpec((None, 1, block), lambda b, c, h, j, i: (b, 0, j)),
            ][: len(segments)],
        ],
        out_specs=[
            pl.BlockSpec((*side, block, C), complete),
            pl.BlockSpec((*side, block, R), complete),
            pl.BlockSpec((*side, block, C), of_key),
            pl.BlockSpec((*side, block, R), last_head),
            pl.BlockSpec((*side, block, W), of_key),
        ],
        scratch_shapes=[
            pltpu.VMEM((C + R, q.shape[2]), jnp.float32),
            pltpu.VMEM((block, C + R), jnp.float32),
            pltpu.VMEM((k.shape[2], R), jnp.float32),
            pltpu.VMEM((block, W), jnp.float32),
            pltpu.VMEM((C + R, block), k.dtype),
            *[pltpu.VMEM((tile, tile), jnp.float32)] * 2,
            *[pltpu.VMEM((tile, tile), v.dtype)] * 2,
            *[pltpu.VMEM((block, LANES), jnp.int32)][: len(segments)],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_mib * MIB,
        ),
        cost_estimate=cost_of(operands, products_of_keys=3, products_of_values=2),
        name="mla_attention_backward",
        interpret=interpret,
    )(q, q_rope, k, k_rope, v, lse, delta, d_out, *segments)
    dk_rope = dk_rope.sum(axis=1).astype(k_rope.dtype)
    return dq[:, :, :T], dq_rope[:, :, :T], dk[:, :, :S], dk_rope[:, :S], dv[:, :, :S]


def _in_spans(
    operands: Operands, lse_BHT: jax.Array, delta_BHT: jax.Array, d_out_BHTW: jax.Array, interpret: Any, blocks: Blocks
) -> tuple[jax.Array, ...]:
    """A span of queries after the other, each with the keys up to its last."""
    q, q_rope, k, k_rope, v, segments_BS, _ = operands
    T, S = q.shape[2], k.shape[2]
    of_queries, of_keys = [], [jnp.zeros(x.shape, jnp.float32) for x in (k, k_rope, v)]
    for start in range(0, T, blocks.span):
        stop = min(start + blocks.span, T)
        behind = S - T + stop
        part = operands._replace(
            q_content_BHTC=q[:, :, start:stop],
            q_rope_BHTR=q_rope[:, :, start:stop],
            k_content_BHSC=k[:, :, :behind],
            k_rope_BSR=k_rope[:, :behind],
            v_BHSW=v[:, :, :behind],
            segments_BS=None if segments_BS is None else segments_BS[:, :behind],
        )
        others = (x[:, :, start:stop] for x in (lse_BHT, delta_BHT, d_out_BHTW))
        dq, dq_rope, *found = backward(part, *others, interpret=interpret, blocks=blocks)
        of_queries.append((dq, dq_rope))
        of_keys = [total + _longer(x, S) for total, x in zip(of_keys, found, strict=True)]
    dq, dq_rope = (jnp.concatenate(parts, axis=2) for parts in zip(*of_queries, strict=True))
    return dq, dq_rope, *(x.astype(k.dtype) for x in of_keys)


def _longer(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 2) + [(0, length - x.shape[-2]), (0, 0)])
