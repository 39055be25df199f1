"""Attention for MLA on TPU's matrix units: the forward pass.

The grid walks blocks of queries, then of keys. Within a step a loop over tiles of keys makes scores of all the block's queries,
so that many rows stream past each key that the matrix units hold, and an online softmax in base 2 goes over them in chunks of a
few rows. Its maxima are kept in all lanes, its sums in each lane for itself. Tiles above the diagonal are not computed, nor
their blocks fetched; only those on it, or all where there are segments, are masked.

Where the matrix units hold 256 columns, a value's 128 would fill half of them. There scores are [keys, queries] and the sums
[width, queries]: what the units hold is weights of 256 queries, what streams past them the values. A maximum is then one of
many along lanes, and found without a move between lanes.
"""

from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.attention.call import LN2, LOG2E, LOWEST, Operands, cost_of, rows_of_segments
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import LANES, MIB, dot, padded, up

SUBLANES = 8  # rows of a register


class Blocks(NamedTuple):
    """Queries and keys in VMEM; keys of one iteration, its queries on the diagonal; rows of one chunk of the softmax."""

    queries: int = 1024
    keys: int = 4096
    tile: int = 512
    height: int = 512
    chunk: int = 32
    vmem_mib: int = 48
    columns: int = LANES  # keys, or queries if turned, of one product
    part: int = 0  # keys of one softmax of scores [keys, queries]; 0: scores are [queries, keys]


# What needed the fewest bundles, see `experiments.bench_kernels`; other chips as v5p.
BLOCKS = Blocks()
TURNED = Blocks(keys=8192, tile=1024, height=1024, chunk=16, vmem_mib=60, columns=256, part=512)
BLOCKS_OF_CHIP = {"TPU v6 lite": TURNED._replace(columns=512), "TPU7x": TURNED}


def forward(operands: Operands, *, interpret: Any, blocks: Blocks | None = None) -> tuple[jax.Array, jax.Array]:
    """As `call.Forward`."""
    q, q_rope, k, k_rope, v, segments_BS, scale = operands
    (B, H, T, C), (S, W), R = q.shape, v.shape[2:], q_rope.shape[3]
    blocks = blocks or BLOCKS_OF_CHIP.get(chip(), BLOCKS)
    block_T, tile = (min(size, up(side, LANES)) for size, side in ((blocks.queries, T), (blocks.tile, S)))
    block_S = min(blocks.keys, up(S, tile))
    height, part = fitting(blocks.height, block_T, blocks.chunk), min(blocks.part, tile)
    turned, part = part > 0, part if part and tile % part == 0 else tile
    assert block_S % tile == 0 and block_T % height == 0 and (part if turned else height) % blocks.chunk == 0
    q, q_rope = (padded(x, block_T) for x in (q, q_rope))
    k, k_rope, v = (padded(x, block_S) for x in (k, k_rope, v))
    offset, tiles = S - T, block_S // tile
    square = block_T == tile and offset % tile == 0  # the one tile on the diagonal begins with the block's first query
    n_T, n_S = q.shape[2] // block_T, k.shape[2] // block_S
    segments = [] if segments_BS is None else rows_of_segments(segments_BS, offset, block_T, block_S)

    def kernel(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any, *refs: Any) -> None:
        (own, others), refs = (refs[:2], refs[2:]) if segments else ((None, None), refs)
        out, lse, most, total, sums, scores, weights, *own_column = refs
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def start() -> None:
            most[...] = jnp.full(most.shape, LOWEST, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)
            sums[...] = jnp.zeros(sums.shape, jnp.float32)
            for column in own_column:
                column[...] = column_of(own[...])

        def add(top: int, height: int, diagonal: bool, t: Any, _: None) -> None:
            """Keys of tile t to `height` queries from `top` on; on the diagonal not every query sees each of the keys."""
            of_rows, of_tile = slice(top, top + height), pl.ds(pl.multiple_of(t * tile, tile), tile)
            queries = beside(q[of_rows, :], q_rope[of_rows, :])
            for part in range(0, tile, blocks.columns):
                size = min(blocks.columns, tile - part)
                at = pl.ds(pl.multiple_of(t * tile + part, LANES), size)
                scores[of_rows, part : part + size] = dot(queries, beside(k[at, :], k_rope[at, :]), 1, 1)
            for row in range(top, top + height, blocks.chunk):
                at, shape, seen = slice(row, row + blocks.chunk), (blocks.chunk, tile), []
                if diagonal:
                    query = lax.broadcasted_iota(jnp.int32, shape, 0) + (offset + i * block_T + row)
                    seen += [lax.broadcasted_iota(jnp.int32, shape, 1) + (j * block_S + t * tile) <= query]
                for column in own_column:
                    seen += [wide(column[at, :], tile) == jnp.broadcast_to(others[:, of_tile], shape)]
                s = scores[at, :] * (scale * LOG2E)
                s = jnp.where(reduce(jnp.logical_and, seen), s, -jnp.inf) if seen else s
                before = most[at, :]
                peak = jnp.maximum(before, s.max(axis=1, keepdims=True))
                p, shrunk = jnp.exp2(s - wide(peak, tile)), jnp.exp2(before - peak)
                most[at, :] = peak
                total[at, :] = total[at, :] * shrunk + sum(p[:, c : c + LANES] for c in range(0, tile, LANES))
                weights[at, :] = p.astype(weights.dtype)
                sums[at, :] = sums[at, :] * wide(shrunk, W)
            sums[of_rows, :] += dot(weights[of_rows, :], v[of_tile, :], 1, 0)

        def add_turned(left: int, width: int, diagonal: bool, t: Any, _: None) -> None:
            """As `add`. Scores of all parts come first, so that the matrix units have them to do during a softmax."""
            ends = [*range(left, left + width, blocks.columns), left + width]
            pieces = [slice(*two) for two in pairwise(ends)]
            parts = [(slice(n, n + part), pl.ds(pl.multiple_of(t * tile + n, LANES), part)) for n in range(0, tile, part)]

            def seeing(of_part: slice) -> list[slice]:
                return [at for at in pieces if not (diagonal and square and at.stop <= of_part.start)]

            for of_part, keys in parts:
                for at in seeing(of_part):
                    scores[of_part, at] = dot(beside(k[keys, :], k_rope[keys, :]), beside(q[at, :], q_rope[at, :]), 1, 1)
            for of_part, keys in parts:
                for at in seeing(of_part):
                    shape, seen = (part, at.stop - at.start), []
                    if diagonal and not (square and at.start >= of_part.stop - 1):
                        query = lax.broadcasted_iota(jnp.int32, shape, 1) + (offset + i * block_T + at.start)
                        seen += [lax.broadcasted_iota(jnp.int32, shape, 0) + (j * block_S + t * tile + of_part.start) <= query]
                    if segments:
                        seen += [wide(column_of(others[:, keys]), shape[1]) == jnp.broadcast_to(own[:, at], shape)]
                    if seen:
                        scores[of_part, at] = jnp.where(reduce(jnp.logical_and, seen), scores[of_part, at], -jnp.inf)
                    before = most[:, at]
                    peak = jnp.maximum(before, scores[of_part, at].max(axis=0, keepdims=True))
                    shrunk, more = jnp.exp2((before - peak) * (scale * LOG2E)), jnp.zeros((SUBLANES, shape[1]), jnp.float32)
                    most[:, at] = peak
                    for row in range(of_part.start, of_part.stop, blocks.chunk):
                        rows = slice(row, row + blocks.chunk)
                        # Scaled after the peak is taken off: else scaled scores wait for the peak, and are spilled.
                        p = jnp.exp2((scores[rows, at] - peak) * (scale * LOG2E))
                        more += p.reshape(-1, SUBLANES, shape[1]).sum(axis=0)
                        weights[rows, at] = p.astype(weights.dtype)
                    total[:, at] = total[:, at] * shrunk + more
                    sums[:, at] = sums[:, at] * shrunk
                for at in seeing(of_part):
                    sums[:, at] += dot(v[keys, :], weights[of_part, at], 0, 0)

        add_tile = add_turned if turned else add
        first = offset + i * block_T - j * block_S  # the block's first query, counted from its first key
        whole = jnp.clip(lax.div(jnp.maximum(first + 1, 0), tile), 0, tiles)
        lax.fori_loop(0, whole, partial(add_tile, 0, block_T, False), None)
        for top in range(0, block_T, height):
            some = jnp.clip(lax.div(jnp.maximum(first + top + height + tile - 1, 0), tile), 0, tiles)
            lax.fori_loop(whole, some, partial(add_tile, top, height, True), None)

        @pl.when(j == n_S - 1)
        def finish() -> None:
            if turned:
                all_rows = total[...].sum(axis=0, keepdims=True)
                none = all_rows == 0
                all_rows = jnp.where(none, 1.0, all_rows)
                out[...] = (sums[...] / all_rows).T.astype(out.dtype)
                lse[...] = jnp.where(none, 0.0, most[...] * scale + jnp.log(all_rows))
                return
            all_lanes = jnp.broadcast_to(total[...].sum(axis=1, keepdims=True), total.shape)
            none = all_lanes == 0  # of padding
            all_lanes = jnp.where(none, 1.0, all_lanes)
            out[...] = (sums[...] / wide(all_lanes, W)).astype(out.dtype)
            lse[...] = jnp.where(none, 0.0, most[...] * LN2 + jnp.log(all_lanes)).T[:1, :]

    def of_query(b: Any, h: Any, i: Any, j: Any) -> Any:
        return b, h, i, 0

    def last(i: Any, j: Any) -> Any:
        """Blocks above the diagonal: the one before them again, which is there already."""
        return jnp.minimum(j, lax.div(jnp.minimum(offset + (i + 1) * block_T, S) - 1, block_S))

    def of_key(b: Any, h: Any, i: Any, j: Any) -> Any:
        return b, h, last(i, j), 0

    side = (None, None)
    shapes = [(block_T, LANES), (block_T, LANES), (block_T, W), (block_T, tile)]
    if turned:
        shapes = [(1, block_T), (SUBLANES, block_T), (W, block_T), (tile, block_T)]
    out, lse = pl.pallas_call(
        kernel,
        out_shape=[
            result((B, H, n_T * block_T, W), v.dtype, v, interpret),
            result((B, H, 1, n_T * block_T), jnp.float32, v, interpret),
        ],
        grid=(B, H, n_T, n_S),
        in_specs=[
            pl.BlockSpec((*side, block_T, C), of_query),
            pl.BlockSpec((*side, block_T, R), of_query),
            pl.BlockSpec((*side, block_S, C), of_key),
            pl.BlockSpec((None, block_S, R), lambda b, h, i, j: (b, last(i, j), 0)),
            pl.BlockSpec((*side, block_S, W), of_key),
            *[
                pl.BlockSpec((None, 1, block_T), lambda b, h, i, j: (b, 0, i)),
                pl.BlockSpec((None, 1, block_S), lambda b, h, i, j: (b, 0, last(i, j))),
            ][: len(segments)],
        ],
        out_specs=[
            pl.BlockSpec((*side, block_T, W), of_query),
            pl.BlockSpec((*side, 1, block_T), lambda b, h, i, j: (b, h, 0, i)),
        ],
        scratch_shapes=[
            *(pltpu.VMEM(shape, jnp.float32) for shape in shapes),
            pltpu.VMEM(shapes[3], v.dtype),
            *[pltpu.VMEM((block_T, LANES), jnp.int32)][: 0 if turned else len(segments)],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_mib * MIB
        ),
        cost_estimate=cost_of(operands, products_of_keys=1, products_of_values=1),
        name="mla_attention",
        interpret=interpret,
    )(q, q_rope, k, k_rope, v, *segments)
    return out[:, :, :T], lse[:, :, 0, :T]


def fitting(height: int, block: int, chunk: int) -> int:
    """The most rows, of whole chunks and at most `height`, of which a block has a whole number."""
    return max(rows for rows in range(chunk, min(height, block) + 1, chunk) if block % rows == 0)


def column_of(row: jax.Array) -> jax.Array:
    """[1, size] -> [size, LANES], the same in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def wide(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES], the same in all lanes -> [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.concatenate([x] * pl.cdiv(width, LANES), axis=1)[:, :width]


def beside(content: jax.Array, rope: jax.Array) -> jax.Array:
    """In registers, where it costs nothing: the matrix units sum over both at once, and are deep enough on some chips."""
    return jnp.concatenate([content, rope], axis=1)
