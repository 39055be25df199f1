"""Attention for MLA on TPU's matrix units: the backward pass.

One kernel makes all gradients, from scores that it computes once; one for the queries' and one for the keys' would do so twice.
The grid walks blocks of keys, and for each of them the blocks of queries from the diagonal on: a list of such pairs, as even a
step that does nothing takes hundreds of cycles. The keys' gradients collect over one such walk, the queries' over all of a
head, in VMEM; a block of them is complete at the diagonal. The rotary key's collect over heads.

Everything but keys and values is turned on its side. Products for gradients are so [width, keys] or [width, queries]: the
width, 192 or 128, is of what streams past the matrix units, where nothing is wasted; of what they hold, 128 or 256 wide, it
would fill a part. Scores are [keys, queries], where a query's log-sum-exp is one of many along lanes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.attention.call import LOG2E, Operands, cost_of, rows_of_segments
from dsv3_jax.kernels.attention.step_tpu import beside, wide
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import LANES, MIB, aligned, dot, padded, up


class Blocks(NamedTuple):
    """Queries, and keys, in VMEM; of one iteration; its queries where all is seen; rows of one chunk of the softmax; queries
    whose gradients fit VMEM."""

    block: int = 2048
    tile: int = 512
    wide: int = 512
    chunk: int = 32
    span: int = 32768
    vmem_mib: int = 60
    columns: int = LANES  # queries of one product


# What needed the fewest bundles, see `experiments.bench_kernels`; other chips as v5p.
BLOCKS = Blocks(columns=256)
BLOCKS_OF_CHIP = {"TPU v6 lite": Blocks(wide=1024, columns=512), "TPU7x": Blocks(wide=1024, columns=256)}

# What else is in VMEM with V3's heads of 128 + 64 and 128, about; in proportion with others.
BLOCKS_MIB, V3_WIDTHS = 20, 320

FLOAT32 = 1024  # of which longer blocks do not fit VMEM beside all that collects

FIRST_OF_KEYS, LAST_OF_KEYS, LAST_OF_QUERIES = 1, 2, 4


def span_of(blocks: Blocks, content: int, rotary: int, value: int, keys: int) -> int:
    """How many queries' gradients fit VMEM beside all keys' rotary ones, which collect there too, and the blocks."""
    numbers = (blocks.vmem_mib - BLOCKS_MIB * (content + rotary + value) / V3_WIDTHS) * MIB / 4
    fit = int(numbers - rotary * keys) // (content + rotary)
    return min(blocks.span, max(blocks.block, fit // blocks.block * blocks.block))


def walk(n_T: int, n_S: int, block: int, offset: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """The steps of a head, [4, steps]: blocks of keys and of queries, of what they are first or last, as bits, and the block of
    queries whose gradients are in the output's buffer, which are complete when it is left."""

    def first_of(j: int) -> int:
        """The first block of queries that sees a key of block j; all before it are complete."""
        return max(j * block - offset, 0) // block

    found = []
    for j in range(n_S):
        first, behind = first_of(j), first_of(j + 1) if j < n_S - 1 else n_T
        for i in range(first, n_T):
            bits = FIRST_OF_KEYS * (i == first) | LAST_OF_KEYS * (i == n_T - 1) | LAST_OF_QUERIES * (i < behind)
            found.append((j, i, bits, min(i, max(first, behind - 1))))
    return np.array(found, np.int32).T


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
    span = span_of(blocks, C, R, W, S)
    if T > span:
        return _in_spans(operands, lse_BHT, delta_BHT, d_out_BHTW, interpret, blocks._replace(span=span))
    tile = min(blocks.tile, up(S, LANES))
    block = min(blocks.block, FLOAT32 if q.dtype == jnp.float32 else blocks.block, up(S, tile))
    wide_tile = blocks.wide if block % blocks.wide == 0 else tile
    assert block % tile == 0 and wide_tile % tile == 0 and tile % blocks.chunk == 0
    q, q_rope, d_out = (padded(x, block) for x in (q, q_rope, d_out_BHTW))
    k, k_rope, v = (padded(x, block) for x in (k, k_rope, v))
    lse, delta = (padded(x, block, -1)[:, :, None, :] for x in (lse_BHT * LOG2E, delta_BHT))
    offset, tiles, n_T, n_S = S - T, block // tile, q.shape[2] // block, k.shape[2] // block
    segments = [] if segments_BS is None else rows_of_segments(segments_BS, offset, block, block)
    cores = 2 - H % 2  # heads whose rotary gradients collect apart: two cores of a chip share nothing
    heads = H // cores

    steps = walk(n_T, n_S, block, offset)

    def kernel(
        steps: Any, q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any, lse: Any, delta: Any, d_out: Any, *refs: Any
    ) -> None:
        (own, others), refs = (refs[:2], refs[2:]) if segments else ((None, None), refs)
        outs, refs = refs[:5], refs[5:]
        dq_all, dk_sum, dk_rope_all, dv_sum, k_across, q_across, d_out_across = refs[:7]
        scores, d_weights, weights, d_scores, *others_column = refs[7:]
        h, s = pl.program_id(2), pl.program_id(3)
        j, i, bits = (steps[row, s] for row in range(3))
        of_block = pl.ds(pl.multiple_of(i * block, block), block)
        of_keys = pl.ds(pl.multiple_of(j * block, block), block)

        @pl.when(bits & FIRST_OF_KEYS != 0)
        def start_keys() -> None:
            dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
            dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)
            k_across[:C, :] = k[...].T
            k_across[C:, :] = k_rope[...].T
            for column in others_column:
                column[...] = jnp.broadcast_to(others[...], (LANES, block)).T

        @pl.when((bits & FIRST_OF_KEYS != 0) & (h == 0))
        def start_rope() -> None:
            dk_rope_all[:, of_keys] = jnp.zeros((R, block), jnp.float32)

        @pl.when(j == 0)
        def start_queries() -> None:
            dq_all[:, of_block] = jnp.zeros((C + R, block), jnp.float32)

        q_across[:C, :] = q[...].T
        q_across[C:, :] = q_rope[...].T
        d_out_across[...] = d_out[...].T

        def add(keys: Any, width: int, masked: bool, b: Any, _: None) -> None:
            """Tile `keys` and piece b of so many queries."""
            of_k, of_q = aligned(keys, tile), aligned(b, width)
            keys_ = beside(k[of_k, :], k_rope[of_k, :])
            for part in range(0, width, blocks.columns):
                size = min(blocks.columns, width - part)
                at, to = pl.ds(pl.multiple_of(b * width + part, LANES), size), slice(part, part + size)
                scores[:, to] = dot(keys_, q_across[:, at])
                d_weights[:, to] = dot(v[of_k, :], d_out_across[:, at])
            all_of_them = slice(0, width)
            for first in range(0, tile, blocks.chunk):
                some, shape = (slice(first, first + blocks.chunk), all_of_them), (blocks.chunk, width)
                p = jnp.exp2(scores[some] * (scale * LOG2E) - lse[:, of_q])
                if masked:
                    key = lax.broadcasted_iota(jnp.int32, shape, 0) + (j * block + keys * tile + first)
                    seen = key <= lax.broadcasted_iota(jnp.int32, shape, 1) + (offset + i * block + b * width)
                    for column in others_column:
                        rows = pl.ds(pl.multiple_of(keys * tile + first, blocks.chunk), blocks.chunk)
                        seen = seen & (wide(column[rows, :], width) == jnp.broadcast_to(own[:, of_q], shape))
                    p = jnp.where(seen, p, 0.0)
                weights[some] = p.astype(weights.dtype)
                d_scores[some] = (p * (d_weights[some] - delta[:, of_q])).astype(d_scores.dtype)
            dv_sum[:, of_k] += dot(d_out_across[:, of_q], weights[:, all_of_them], 1, 1)
            dk_sum[:, of_k] += dot(q_across[:, of_q], d_scores[:, all_of_them], 1, 1)
            of_q_all = pl.ds(pl.multiple_of(i * block + b * width, width), width)
            dq_all[:, of_q_all] += dot(k_across[:, of_k], d_scores[:, all_of_them])

        def add_keys(keys: Any, _: None) -> None:
            behind = j * block + keys * tile - offset - i * block  # the tile's first key, counted from the first query
            first, whole = (jnp.clip(lax.div(jnp.maximum(n, 0), tile), 0, tiles) for n in (behind, behind + 2 * tile - 2))
            if segments:
                return lax.fori_loop(first, tiles, partial(add, keys, tile, True), None)
            # Queries from the tile's last key on see all of it: there nothing is compared.
            each = wide_tile // tile
            whole = lax.div(whole + each - 1, each)
            lax.fori_loop(first, whole * each, partial(add, keys, tile, True), None)
            lax.fori_loop(whole, tiles // each, partial(add, keys, wide_tile, False), None)

        lax.fori_loop(0, tiles, add_keys, None)
        dq, dq_rope, dk, dk_rope, dv = outs

        @pl.when(bits & LAST_OF_QUERIES != 0)
        def finish_queries() -> None:
            both = (dq_all[:, of_block] * scale).T
            dq[...] = both[:, :C].astype(dq.dtype)
            dq_rope[...] = both[:, C:].astype(dq_rope.dtype)

        @pl.when(bits & LAST_OF_KEYS != 0)
        def finish_keys() -> None:
            dk[...] = (dk_sum[:C, :] * scale).T.astype(dk.dtype)
            dk_rope_all[:, of_keys] += dk_sum[C:, :]
            dv[...] = dv_sum[...].T.astype(dv.dtype)

        @pl.when((bits & LAST_OF_KEYS != 0) & (h == heads - 1))
        def finish_rope() -> None:
            dk_rope[...] = dk_rope_all[:, of_keys] * scale

    def head(c: Any, h: Any) -> Any:
        return c * heads + h

    def of_query(b: Any, c: Any, h: Any, s: Any, steps: Any) -> Any:
        return b, head(c, h), steps[1, s], 0

    def of_key(b: Any, c: Any, h: Any, s: Any, steps: Any) -> Any:
        return b, head(c, h), steps[0, s], 0

    def along(b: Any, c: Any, h: Any, s: Any, steps: Any) -> Any:
        return b, head(c, h), 0, steps[1, s]

    def complete(b: Any, c: Any, h: Any, s: Any, steps: Any) -> Any:
        return b, head(c, h), steps[3, s], 0

    def last_head(b: Any, c: Any, h: Any, s: Any, steps: Any) -> Any:
        return b, c, 0, jnp.where(h == heads - 1, steps[0, s], 0)

    side = (None, None)
    specs = {width: pl.BlockSpec((*side, block, width), of_query) for width in (C, R, W)}
    dq, dq_rope, dk, dk_rope, dv = pl.pallas_call(
        kernel,
        out_shape=[
            result(q.shape, q.dtype, q, interpret),
            result(q_rope.shape, q.dtype, q, interpret),
            result(k.shape, k.dtype, q, interpret),
            result((B, cores, R, k.shape[2]), jnp.float32, q, interpret),
            result(v.shape, v.dtype, q, interpret),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, cores, heads, steps.shape[1]),
            in_specs=[
                specs[C],
                specs[R],
                pl.BlockSpec((*side, block, C), of_key),
                pl.BlockSpec((None, block, R), lambda b, c, h, s, steps: (b, steps[0, s], 0)),
                pl.BlockSpec((*side, block, W), of_key),
                pl.BlockSpec((*side, 1, block), along),
                pl.BlockSpec((*side, 1, block), along),
                specs[W],
                *[
                    pl.BlockSpec((None, 1, block), lambda b, c, h, s, steps: (b, 0, steps[1, s])),
                    pl.BlockSpec((None, 1, block), lambda b, c, h, s, steps: (b, 0, steps[0, s])),
                ][: len(segments)],
            ],
            out_specs=[
                pl.BlockSpec((*side, block, C), complete),
                pl.BlockSpec((*side, block, R), complete),
                pl.BlockSpec((*side, block, C), of_key),
                pl.BlockSpec((*side, R, block), last_head),
                pl.BlockSpec((*side, block, W), of_key),
            ],
            scratch_shapes=[
                *(
                    pltpu.VMEM(shape, jnp.float32)
                    for shape in ((C + R, q.shape[2]), (C + R, block), (R, k.shape[2]), (W, block))
                ),
                *(pltpu.VMEM((width, block), k.dtype) for width in (C + R, C + R, W)),
                *(pltpu.VMEM((tile, wide_tile), dtype) for dtype in (jnp.float32, jnp.float32, v.dtype, v.dtype)),
                *[pltpu.VMEM((block, LANES), jnp.int32)][: len(segments)],
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_mib * MIB,
        ),
        cost_estimate=cost_of(operands, products_of_keys=3, products_of_values=2),
        name="mla_attention_backward",
        interpret=interpret,
    )(jnp.asarray(steps), q, q_rope, k, k_rope, v, lse, delta, d_out, *segments)
    dk_rope = dk_rope.sum(axis=1).swapaxes(1, 2).astype(k_rope.dtype)
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
