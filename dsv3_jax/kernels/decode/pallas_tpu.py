"""Attention over a cache of latents on TPU: the queries of all heads are the rows of the matrix products.

The grid walks a list of (part, block of rows); each core of a chip that has two takes a run of whole parts. The cache stays in
HBM: a step starts the copies of a block that comes `depth - 1` steps later, piece by piece and only pieces with rows that are
seen, and waits for its own. So blocks of the next sequence are on their way while one ends, and lengths that differ cost
nothing but their last pieces. A row of the cache is read from HBM once, as key and as value.

What lies in a block behind the rows that are seen is undefined, NaN at worst: it is cleared before it meets a weight of zero.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.decode.work import make_work
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import LANES, MIB, SUBLANES_BF16, dot, up

PIECE = 128
TOGETHER = 8  # copies that are started in one go
LOWEST = float(jnp.finfo(jnp.float32).min)


class Blocks(NamedTuple):
    rows: int  # of the cache in one step
    height: int  # of them in one iteration, where not all are seen
    queries: int  # of one product
    columns: int  # of its result; heights and rows are multiples, and they of lanes
    depth: int = 4  # blocks in VMEM, the ones on their way included
    vmem_mib: int = 32


BLOCKS = Blocks(1024, 256, 256, 128)
BLOCKS_OF_CHIP = dict.fromkeys(("TPU v6 lite", "TPU7x"), BLOCKS._replace(columns=256))  # as wide as their matrix units


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
    (batch, n, width), page, pages = q_BNK.shape, cache_PSK.shape[1], table_BM.shape[1]
    n_parts, most, queries = batch * splits, pages * page, n // heads
    if page % SUBLANES_BF16 and pages > 1:
        raise ValueError(f"cache: expected pages of a multiple of {SUBLANES_BF16} rows on TPU, got {page}; allocate such pages")
    cache_PSK = jnp.pad(cache_PSK, ((0, 0), (0, -page % SUBLANES_BF16), (0, 0)))  # copies end with whole tiles
    page, piece = cache_PSK.shape[1], piece_of(page)
    blocks = fitted(blocks or BLOCKS_OF_CHIP.get(chip(), BLOCKS), most)
    cores, columns = cores_for(n_parts), blocks.columns
    work = make_work(jnp.clip(length_B, 0, most), blocks.rows, splits, most, cores)
    to_base_2 = scale * math.log2(math.e)

    def kernel(part_E: Any, block_E: Any, first_L: Any, table: Any, length_B: Any, q: Any, cache: Any, *refs: Any) -> None:
        out, lse, rows_DSK, arrived, scores, weights, sums, tops, totals = refs
        core, step = pl.program_id(0), pl.program_id(1)
        begin, end = first_L[core], first_L[core + 1]
        entry = begin + step

        def visible(e: Any) -> Any:
            """Rows of an entry's block that the last query sees."""
            length = jnp.minimum(length_B[lax.div(part_E[e], splits)], most)
            return jnp.clip(length - block_E[e] * blocks.rows, 0, blocks.rows)

        def copies(e: Any, do: Any) -> None:
            slot, b = lax.rem(e - begin, blocks.depth), lax.div(part_E[e], splits)
            target, entries, first = rows_DSK.at[slot], b * pages, block_E[e] * (blocks.rows // piece)

            def one(i: Any, _: None = None) -> None:
                if pages == 1:
                    own, row = table[b], (first + i) * piece
                elif page == piece:
                    own, row = table[entries + first + i], 0
                else:
                    own, row = table[entries + lax.div(first + i, page // piece)], lax.rem(first + i, page // piece) * piece
                source = cache.at[own, pl.ds(pl.multiple_of(row, piece), piece)]
                do(pltpu.make_async_copy(source, target.at[pl.ds(pl.multiple_of(i * piece, piece), piece)], arrived.at[slot]))

            def some(i: Any, _: None) -> None:  # one after the other, each would wait for its own address
                for j in range(TOGETHER):
                    one(i * TOGETHER + j)

            pieces = lax.div(visible(e) + piece - 1, piece)
            together = lax.div(pieces, TOGETHER)
            lax.fori_loop(jnp.int32(0), together, some, None)
            lax.fori_loop(together * TOGETHER, pieces, one, None)

        def start(e: Any) -> None:
            pl.when(e < end)(lambda: copies(e, lambda copy: copy.start()))

        @pl.when(step == 0)
        def first_blocks() -> None:
            for ahead in range(blocks.depth - 1):
                start(entry + ahead)

        @pl.when(entry < end)
        def compute() -> None:
            start(entry + blocks.depth - 1)
            copies(entry, lambda copy: copy.wait())
            part = part_E[entry]

            @pl.when((step == 0) | (part_E[jnp.maximum(entry - 1, 0)] != part))
            def init() -> None:
                tops[...] = jnp.full(tops.shape, LOWEST, jnp.float32)
                totals[...] = jnp.zeros(totals.shape, jnp.float32)
                sums[...] = jnp.zeros(sums.shape, jnp.float32)

            left, slot = visible(entry), lax.rem(step, blocks.depth)
            # Of the queries, n // heads comes first and sees fewer rows than the last one.
            first_seen = length_B[lax.div(part, splits)] - block_E[entry] * blocks.rows - queries + 1

            def attend_to(first: Any, height: int, *, whole: bool) -> None:
                at = pl.ds(first, height)
                if not whole:

                    @pl.when(left < first + height)
                    def clear() -> None:
                        row = lax.broadcasted_iota(jnp.int32, (height, 1), 0) + first
                        rows_DSK[slot, at, :] = jnp.where(row < left, rows_DSK[slot, at, :], jnp.zeros((), rows_DSK.dtype))

                for group in _cuts(n, blocks.queries):
                    highest = jnp.full((group.stop - group.start, LANES), LOWEST, jnp.float32)
                    for c in range(0, height, columns):
                        keys = rows_DSK[slot, pl.ds(first + c, columns), pl.ds(0, width)]
                        values = dot(q[group, :], keys, 1, 1) * to_base_2
                        if not whole:
                            query = lax.div(lax.broadcasted_iota(jnp.int32, (values.shape[0], 1), 0) + group.start, heads)
                            row = lax.broadcasted_iota(jnp.int32, (1, columns), 1) + (first + c)
                            values = jnp.where(row < jnp.minimum(first_seen + query, left), values, -jnp.inf)
                        scores[group, c : c + columns] = values
                        for i in range(0, columns, LANES):
                            highest = jnp.maximum(highest, values[:, i : i + LANES])
                    top = jnp.maximum(tops[group, :], highest.max(axis=1, keepdims=True))
                    shrink = jnp.exp2(tops[group, :] - top)
                    total = totals[group, :] * shrink
                    tops[group, :] = top
                    for c in range(0, height, LANES):
                        values = jnp.exp2(scores[group, c : c + LANES] - top)
                        total = total + values
                        weights[group, c : c + LANES] = values.astype(weights.dtype)
                    totals[group, :] = total
                    for at in _cuts(latent, columns):
                        product = dot(weights[group, :height], rows_DSK[slot, pl.ds(first, height), at])
                        sums[group, at] = sums[group, at] * _wide(shrink, at.stop - at.start) + product

            whole = (left == blocks.rows) & (first_seen >= blocks.rows)
            pl.when(whole)(lambda: attend_to(0, blocks.rows, whole=True))

            @pl.when(jnp.logical_not(whole))
            def in_pieces() -> None:
                def one(i: Any, _: None) -> None:
                    attend_to(pl.multiple_of(i * blocks.height, blocks.height), blocks.height, whole=False)

                lax.fori_loop(jnp.int32(0), lax.div(left + blocks.height - 1, blocks.height), one, None)

            @pl.when((entry + 1 == end) | (part_E[jnp.minimum(entry + 1, part_E.shape[0] - 1)] != part))
            def finish() -> None:
                total, top = totals[...].sum(axis=1, keepdims=True), tops[:, :1]
                some = total > 0
                divisor = jnp.where(some, total, 1.0)
                out[...] = (sums[...] / divisor).astype(out.dtype)
                found = jnp.where(some, (top + jnp.log2(divisor)) * math.log(2), -jnp.inf)
                lse[...] = jnp.broadcast_to(found, (n, LANES)).T[:1]

    def entry_at(core: Any, step: Any, first_L: Any) -> Any:
        return jnp.minimum(first_L[core] + step, first_L[core + 1] - 1)

    def q_at(core: Any, step: Any, part_E: Any, block_E: Any, first_L: Any, *_: Any) -> Any:
        return lax.div(part_E[entry_at(core, step, first_L)], splits), 0, 0

    def part_at(core: Any, step: Any, part_E: Any, block_E: Any, first_L: Any, *_: Any) -> Any:
        return part_E[entry_at(core, step, first_L)], 0, 0

    call = pl.pallas_call(
        kernel,
        out_shape=[
            result((n_parts, n, latent), dtype, (q_BNK, cache_PSK), interpret),
            result((n_parts, 1, n), jnp.float32, (q_BNK, cache_PSK), interpret),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, (work.first_L[1:] - work.first_L[:-1]).max()),
            in_specs=[pl.BlockSpec((None, n, width), q_at), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[pl.BlockSpec((None, n, latent), part_at), pl.BlockSpec((None, 1, n), part_at)],
            scratch_shapes=[
                pltpu.VMEM((blocks.depth, blocks.rows, cache_PSK.shape[2]), cache_PSK.dtype),
                pltpu.SemaphoreType.DMA((blocks.depth,)),
                pltpu.VMEM((n, blocks.rows), jnp.float32),
                pltpu.VMEM((n, blocks.rows), q_BNK.dtype),
                pltpu.VMEM((n, latent), jnp.float32),
                *[pltpu.VMEM((n, LANES), jnp.float32)] * 2,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_mib * MIB,
            disable_bounds_checks=True,  # they are most of the instructions that start a copy
        ),
        name=name,
        interpret=interpret,
    )
    out, lse = call(*work, table_BM.reshape(-1), length_B, q_BNK, cache_PSK)
    return out.reshape(batch, splits, n, latent).swapaxes(0, 1), lse.reshape(batch, splits, n).swapaxes(0, 1)


def cores_for(parts: int) -> int:
    """How many runs of parts there are: one for each core of a v5p; the others go through both."""
    return min(parts, 2)


def piece_of(page: int) -> int:
    """Rows of one copy: they divide a page, and are whole tiles."""
    return math.gcd(up(page, SUBLANES_BF16), PIECE)


def fitted(blocks: Blocks, most: int) -> Blocks:
    """Blocks about as large as sequences of `most` rows need, at most."""
    height = min(blocks.height, up(most, blocks.columns))
    return blocks._replace(height=height, rows=min(blocks.rows, up(most, height)))


def _cuts(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _wide(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES], all columns alike, as [rows, width]."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]
