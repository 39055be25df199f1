"""Attention over a cache of latents on GPU's tensor cores, through Triton.

A program takes some of a sequence's queries and one of its splits; it reads a row of the cache once, as key and as value, from
wherever its page is, and never one that no query sees. The latent and the rotated part are apart: Triton's sides are powers of
two.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dsv3_jax.kernels.decode.work import runs
from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.tiles import dot

LOWEST = float(jnp.finfo(jnp.float32).min)


class Blocks(NamedTuple):
    """Powers of two, as Triton has it."""

    queries: int
    rows: int  # of the cache
    warps: int
    stages: int


# The first that has room for all queries of a sequence, or the last. Tensor cores have no float32: it takes registers.
BLOCKS = {
    jnp.dtype(jnp.bfloat16): (Blocks(16, 64, 4, 2), Blocks(32, 64, 4, 2)),
    jnp.dtype(jnp.float32): (Blocks(16, 16, 4, 2),),
}


def attend(
    q_BNK: jax.Array,
    cache_PSK: jax.Array,
    table_BM: jax.Array,
    length_B: jax.Array,
    *,
    heads: int,
    latent: int,
    scale: float,
    splits: int,
    dtype: Any,
    name: str,
    interpret: Any,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `call.Attend`."""
    (batch, n, width), page, most = q_BNK.shape, cache_PSK.shape[1], table_BM.shape[1] * cache_PSK.shape[1]
    table = BLOCKS[q_BNK.dtype]
    blocks = blocks or next((b for b in table if n <= b.queries), table[-1])
    starts = [0, latent] if width > latent else [0]
    ends = [latent, width][: len(starts)]
    sides = [max(16, pl.next_power_of_2(end - start)) for start, end in zip(starts, ends, strict=True)]
    rows_of_q = -n % blocks.queries
    qs = [
        jnp.pad(q_BNK[..., start:end], ((0, 0), (0, rows_of_q), (0, side - (end - start))))
        for start, end, side in zip(starts, ends, sides, strict=True)
    ]
    n_padded = n + rows_of_q
    first_BX, end_BX = runs(jnp.clip(length_B, 0, most), blocks.rows, splits)
    to_base_2, queries = scale * math.log2(math.e), n // heads

    def kernel(first_BX: Any, end_BX: Any, length_B: Any, table: Any, cache: Any, *refs: Any) -> None:
        qs, (out, lse) = refs[: len(sides)], refs[len(sides) :]
        tile, part, b = (pl.program_id(axis) for axis in range(3))
        at = pl.ds(tile * blocks.queries, blocks.queries)
        query = lax.div(tile * blocks.queries + jnp.arange(blocks.queries, dtype=jnp.int32), heads)
        length = length_B[b]
        visible = jnp.minimum(length, most)
        seen = jnp.minimum(length - queries + 1 + query, visible)[:, None]
        q_parts = [q[b, at, :] for q in qs]

        def add(i: Any, state: Any) -> Any:
            top, total, result = state
            row = i * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32)
            own = row < visible
            if page % blocks.rows:  # a row is where its own page is
                own_page = plgpu.load(table.at[b, lax.div(row, page)], mask=own, other=0)[:, None]
                place = lax.rem(row, page)[:, None]
            else:  # the block is within one
                own_page = table[b, lax.div(i * blocks.rows, page)]
                place = lax.rem(i * blocks.rows, page) + jnp.arange(blocks.rows, dtype=jnp.int32)[:, None]

            def load(start: int, end: int, side: int) -> Any:
                column = start + jnp.arange(side, dtype=jnp.int32)
                mask = own[:, None] if side == end - start else own[:, None] & (column < end)[None, :]
                mask = jnp.broadcast_to(mask, (blocks.rows, side))
                return plgpu.load(cache.at[own_page, place, column[None, :]], mask=mask, other=0.0)

            keys = [load(*ends_of) for ends_of in zip(starts, ends, sides, strict=True)]
            scores = sum(dot(q, key.T) for q, key in zip(q_parts, keys, strict=True)) * to_base_2
            scores = jnp.where(row[None, :] < seen, scores, -jnp.inf)
            higher = jnp.maximum(top, scores.max(axis=1))
            weights, shrink = jnp.exp2(scores - higher[:, None]), jnp.exp2(top - higher)
            result = result * shrink[:, None] + dot(weights.astype(keys[0].dtype), keys[0])
            return higher, total * shrink + weights.sum(axis=1), result

        zeros = jnp.zeros((blocks.queries,), jnp.float32)
        state = zeros + LOWEST, zeros, jnp.zeros((blocks.queries, sides[0]), jnp.float32)
        top, total, result = lax.fori_loop(first_BX[b, part], end_BX[b, part], add, state)
        some = total > 0
        divisor = jnp.where(some, total, 1.0)
        out[part, b, at, :] = (result / divisor[:, None]).astype(out.dtype)
        lse[part, b, at] = jnp.where(some, (top + jnp.log2(divisor)) * math.log(2), -jnp.inf)

    call = pl.pallas_call(
        kernel,
        out_shape=[
            result((splits, batch, n_padded, sides[0]), dtype, (q_BNK, cache_PSK), interpret),
            result((splits, batch, n_padded), jnp.float32, (q_BNK, cache_PSK), interpret),
        ],
        grid=(n_padded // blocks.queries, splits, batch),  # those that read the same rows run at the same time
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name=name,
        interpret=interpret,
    )
    out, lse = call(first_BX, end_BX, length_B, table_BM, cache_PSK, *qs)
    return out[:, :, :n, :latent], lse[:, :, :n]
