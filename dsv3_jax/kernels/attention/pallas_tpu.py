"""Attention for MLA on TPU's matrix units: the forward pass.

The grid walks blocks of queries, then of keys. Within a step a loop over tiles of keys makes scores of all the block's queries,
so that many rows stream past each key that the matrix units hold, and an online softmax in base 2 goes over them in chunks of a
few rows. Its maxima are kept in all lanes, its sums in each lane for itself. Tiles above the diagonal are not computed, nor
their blocks fetched; only those on it, or all where there are segments, are masked.

Where the matrix units hold 256 columns, a value's 128 would fill half of them. There scores are [keys, queries] and the sums
[width, queries]: what the units hold is weights of 256 queries, what streams past them the values. A maximum is then one of
many along lanes, and found without a move between lanes. An iteration is a tile of keys with a piece of the block's queries,
which all see the tile or are on the diagonal. It makes the next iteration's scores, be they of the next piece, while the vector
units have the softmax of its own, in the other of two buffers. Which one is which is static in each of two copies of the code:
the compiler lets a store pass a load only where it knows both addresses.
"""

from functools import partial, reduce
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
    """Queries and keys in VMEM; keys of one iteration, its queries (on the diagonal, if not turned); rows of a chunk."""

    queries: int = 1024
    keys: int = 4096
    tile: int = 512
    height: int = 512
    chunk: int = 32
    vmem_mib: int = 48
    columns: int = LANES  # keys, or queries if turned, of one product
    part: int = 0  # keys of one product if turned; 0: not turned, scores are [queries, keys]


# What needed the fewest bundles, see `experiments.bench_kernels`; other chips as v5p.
BLOCKS = Blocks()
TURNED = Blocks(queries=4096, keys=8192, tile=1024, height=1024, chunk=16, vmem_mib=60, columns=256, part=256)
BLOCKS_OF_CHIP = {"TPU v6 lite": TURNED._replace(chunk=32, part=512), "TPU7x": TURNED}


def forward(operands: Operands, *, interpret: Any, blocks: Blocks | None = None) -> tuple[jax.Array, jax.Array]:
    """As `call.Forward`."""
    q, q_rope, k, k_rope, v, segments_BS, scale = operands
    (B, H, T, C), (S, W), R = q.shape, v.shape[2:], q_rope.shape[3]
    blocks = blocks or BLOCKS_OF_CHIP.get(chip(), BLOCKS)
    turned, tile = blocks.part > 0, min(blocks.tile, up(S, LANES))
    block_T, height = queries_of(blocks, T)
    block_S, part = min(blocks.keys, up(S, tile)), blocks.part if turned and tile % blocks.part == 0 else tile
    assert block_S % tile == 0 and block_T % height == 0 and (tile if turned else height) % blocks.chunk == 0
    q, q_rope = (padded(x, block_T) for x in (q, q_rope))
    k, k_rope, v = (padded(x, block_S) for x in (k, k_rope, v))
    offset, tiles = S - T, block_S // tile
    square = height == tile and offset % tile == 0  # turned, the one tile on the diagonal begins with the first query
    n_T, n_S = q.shape[2] // block_T, k.shape[2] // block_S
    segments = [] if segments_BS is None else rows_of_segments(segments_BS, offset, block_T, block_S)

    def kernel(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any, *refs: Any) -> None:
        (own, others), refs = (refs[:2], refs[2:]) if segments else ((None, None), refs)
        out, lse, most, total, sums, scores, weights, *more_refs = refs
        of_turned: list[Any] = more_refs if turned else [None] * 3
        own_column, (peaks, across, across_rope) = [] if turned else more_refs, of_turned
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def start() -> None:
            most[...] = jnp.full(most.shape, LOWEST, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)
            sums[...] = jnp.zeros(sums.shape, jnp.float32)
            if turned:  # once: the units take them faster so
                across[...], across_rope[...] = q[...].T, q_rope[...].T
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

        def ahead(slot: int, c: Any, t: Any, at: slice) -> None:
            """Scores of keys of tile t with some of the queries of piece c."""
            queries, highest = pl.ds(pl.multiple_of(c * height + at.start, LANES), at.stop - at.start), []
            for top in range(0, tile, part):
                keys = pl.ds(pl.multiple_of(t * tile + top, LANES), part)
                both = jnp.concatenate([across[:, queries], across_rope[:, queries]], axis=0)
                s = dot(beside(k[keys, :], k_rope[keys, :]), both, 1, 0)
                scores[slot, top : top + part, at] = s
                highest.append(s.reshape(-1, SUBLANES, s.shape[1]).max(axis=0))
            peaks[slot, :, at] = reduce(jnp.maximum, highest)

        def add_turned(slot: int, diagonal: bool, c: Any, t: Any, then_c: Any, then_t: Any) -> None:
            """As `add`, of scores that are there; those of the next iteration are made meanwhile."""
            for left in range(0, height, blocks.columns):
                at = slice(left, min(left + blocks.columns, height))
                of, size = pl.ds(pl.multiple_of(c * height + left, LANES), at.stop - left), at.stop - left
                keys = at.stop if diagonal and square else tile  # that one of the queries sees
                hidden = slice(left if square and not segments else 0, keys)  # from some
                shape, seen = (keys - hidden.start, size), []
                if diagonal:
                    query = lax.broadcasted_iota(jnp.int32, shape, 1) + (offset + i * block_T + c * height + left)
                    key = lax.broadcasted_iota(jnp.int32, shape, 0) + (j * block_S + t * tile + hidden.start)
                    seen += [key <= query]
                if segments:
                    of_key = column_of(others[:, pl.ds(pl.multiple_of(t * tile, LANES), keys)])
                    seen += [wide(of_key, size) == jnp.broadcast_to(own[:, of], shape)]
                if seen:
                    scores[slot, hidden, at] = jnp.where(reduce(jnp.logical_and, seen), scores[slot, hidden, at], -jnp.inf)
                    peaks[slot, :, at] = scores[slot, :keys, at].reshape(-1, SUBLANES, size).max(axis=0)
                before = most[:, of]
                peak = jnp.maximum(before, peaks[slot, :, at].max(axis=0, keepdims=True))
                shrunk, more = jnp.exp2((before - peak) * (scale * LOG2E)), jnp.zeros((SUBLANES, size), jnp.float32)
                most[:, of] = peak
                for row in range(0, keys, blocks.chunk):
                    rows = slice(row, row + blocks.chunk)
                    # Scaled after the peak is taken off: else scaled scores wait for the peak, and are spilled.
                    p = jnp.exp2((scores[slot, rows, at] - peak) * (scale * LOG2E))
                    more += p.reshape(-1, SUBLANES, size).sum(axis=0)
                    weights[rows, at] = p.astype(weights.dtype)
                total[:, of] = total[:, of] * shrunk + more
                sums[:, of] = sums[:, of] * shrunk
                ahead(1 - slot, then_c, then_t, at)
                values = v[pl.ds(pl.multiple_of(t * tile, LANES), keys), :]
                sums[:, of] += dot(values, weights[:keys, at], 0, 0)

        first = offset + i * block_T - j * block_S  # the block's first query, counted from its first key

        def tiles_of(top: Any, height: int) -> tuple[Any, Any]:
            """Tiles that all of the queries from `top` on see whole, and those that some see of."""
            ends = first + top + 1, first + top + height + tile - 1
            whole, some = (jnp.clip(lax.div(jnp.maximum(n, 0), tile), 0, tiles) for n in ends)
            return whole, some

        if turned:
            pieces = jnp.minimum(block_T // height, pl.cdiv(T - i * block_T, height))
            lowest = lax.div(jnp.maximum(-first, 0), height)  # the first piece that sees one of the keys

            @pl.when(lowest < pieces)
            def begin() -> None:
                for left in range(0, height, blocks.columns):
                    ahead(0, lowest, 0, slice(left, min(left + blocks.columns, height)))

            def piece(c: Any, slot: Any) -> Any:
                whole, some = tiles_of(c * height, height)

                def iteration(diagonal: bool, t: Any, slot: Any) -> Any:
                    after = t + 1 < some
                    then = jnp.where(after, c, jnp.minimum(c + 1, pieces - 1)), jnp.where(after, t + 1, 0)
                    for n in range(2):
                        pl.when(slot == n)(partial(add_turned, n, diagonal, c, t, *then))
                    return 1 - slot

                slot = lax.fori_loop(0, whole, partial(iteration, False), slot)
                return lax.fori_loop(whole, some, partial(iteration, True), slot)

            lax.fori_loop(lowest, pieces, piece, 0)
        else:
            whole, _ = tiles_of(0, block_T)
            lax.fori_loop(0, whole, partial(add, 0, block_T, False), None)
            for top in range(0, block_T, height):
                lax.fori_loop(whole, tiles_of(top, height)[1], partial(add, top, height, True), None)

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
    shapes: list[tuple[int, ...]] = [(block_T, LANES), (block_T, LANES), (block_T, W), (block_T, tile)]
    if turned:
        shapes = [(1, block_T), (SUBLANES, block_T), (W, block_T), (2, tile, height)]
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
            pltpu.VMEM(shapes[3][-2:], v.dtype),
            *[pltpu.VMEM((block_T, LANES), jnp.int32)][: 0 if turned else len(segments)],
            *[
                pltpu.VMEM((2, SUBLANES, height), jnp.float32),
                pltpu.VMEM((C, block_T), q.dtype),
                pltpu.VMEM((R, block_T), q.dtype),
            ][: 3 * turned],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_mib * MIB
        ),
        cost_estimate=cost_of(operands, products_of_keys=1, products_of_values=1),
        name="mla_attention",
        interpret=interpret,
    )(q, q_rope, k, k_rope, v, *segments)
    return out[:, :, :T], lse[:, :, 0, :T]


def queries_of(blocks: Blocks, T: int) -> tuple[int, int]:
    """Of a grid step, and of an iteration (if not turned, on the diagonal): about as many in each, of whole registers."""
    if not blocks.part:
        block = min(blocks.queries, up(T, LANES))
        return block, fitting(blocks.height, block, blocks.chunk)
    pieces = pl.cdiv(T, blocks.height)
    height = up(pl.cdiv(T, pieces), LANES)
    return height * min(pieces, blocks.queries // blocks.height), height


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
