"""The scaled products on TPU's matrix units.

The grid is that of `kernels.grouped`: blocks of the output's columns, then the list of (group, tile of rows), then the
contraction. Within a step a loop goes over parts of the output whose sums stay in registers while all of the block's tiles
are multiplied, scaled and added. Chips without FP8 multiply bfloat16, which holds every e4m3 and e5m2: a block is converted
once, when it arrives; a group's matrix so once for all of its rows. Products are added up transposed, [O, R]: a row's scale is
then one of many along lanes, where a register of them is read for nothing; to spread it over lanes would keep the units that
move data between lanes busier than the matrix units. The gradient of weights has scales along both sides: those of one are
spread a strip of rows ahead, while the matrix units are busy. Its sums are in VMEM, so that fewer registers spill.

What lies beyond an operand's edge is undefined, and so are rows between the groups' and the end. Products keep rows and columns
apart, and the contraction is whole tiles; of a sum over rows, tiles of other groups are left out after they are multiplied.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped.work import make_work
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.scaled.call import SIDE, Tiled
from dsv3_jax.kernels.tiles import LANES, MIB, PACKED, SUBLANES, aligned, dot, estimate, fitted, padded, up


class Blocks(NamedTuple):
    """Of a product [R, I] x [I, O]: rows, contraction and columns in VMEM; rows and columns of one iteration."""

    rows: int
    inner: int
    outer: int
    height: int
    columns: int
    unroll: int = 1  # iterations that are scheduled together
    vmem_mib: int = 62


BLOCKS = Blocks(512, 7168, 1024, 128, 256, unroll=4), Blocks(512, 2048, 2048, 128, 256, unroll=8)
OF_CHIPS = {
    "TPU v6 lite": (BLOCKS[0], BLOCKS[1]._replace(height=256)),
    "TPU7x": (BLOCKS[0]._replace(unroll=2), BLOCKS[1]._replace(height=256)),
}
FP8 = ("TPU7x",)  # whose matrix units take it


def blocks_of(kind: str) -> tuple[Blocks, Blocks]:
    """For products, and for sums over rows."""
    return OF_CHIPS.get(kind, BLOCKS)


def _parted(size: int, block: int) -> int:
    """Parts of so many tiles at most, all alike where that does not make them less than half."""
    tiles, most = -(-size // SIDE), block // SIDE
    divisors = (n for n in range(min(most, tiles), most // 2, -1) if tiles % n == 0)
    return SIDE * next(divisors, -(-tiles // -(-tiles // most)))


def _even(size: int, block: int, step: int) -> int:
    """A block for as many of them, but all about as large."""
    return up(-(-size // -(-size // block)), step)


def _unroll(iterations: int, most: int) -> int:
    """So many of them at most that all turns are alike."""
    return next(n for n in range(most, 0, -1) if iterations % n == 0)


def fit_products(blocks: Blocks, rows: int, inner: int, outer: int) -> Blocks:
    """No larger than the operands of [R, I] x [I, O]; with a shorter contraction more columns, up to four times as many."""
    deep = _parted(inner, blocks.inner)
    most = min(blocks.outer * blocks.inner // deep, 4 * blocks.outer) // blocks.columns * blocks.columns
    tall, height = fitted(rows, blocks.rows, blocks.height, LANES)
    wide, columns = fitted(outer, most, blocks.columns, LANES)
    wide = _even(outer, wide, columns)
    unroll = _unroll(wide // columns, min(blocks.unroll * blocks.inner // deep, 8))
    return Blocks(tall, deep, wide, height, columns, unroll, blocks.vmem_mib)


def fit_outer(blocks: Blocks, rows: int, inner: int, outer: int) -> Blocks:
    """No larger than the operands of [I, R] x [R, O]; an iteration's height is along I."""
    (deep, height), (wide, columns) = (
        fitted(inner, blocks.inner, blocks.height, PACKED), fitted(outer, blocks.outer, blocks.columns, LANES)
    )  # fmt: skip
    deep, wide = _even(inner, deep, height), _even(outer, wide, columns)
    unroll = _unroll(wide // columns, blocks.unroll)
    return Blocks(min(blocks.rows, up(rows, SIDE)), deep, wide, height, columns, unroll, blocks.vmem_mib)


def products(
    a: Tiled,
    b: Tiled,
    count_E: jax.Array,
    *,
    transposed: bool,
    dtype: Any,
    name: str,
    interpret: Any,
    blocks: Blocks | None = None,
) -> jax.Array:
    """As `call.Products`."""
    (x_RI, x_scale), (w, w_scale) = a, b
    (rows, inner), n_groups, outer = x_RI.shape, w.shape[0], w.shape[1 if transposed else 2]
    blocks = fit_products(blocks or blocks_of(chip())[0], rows, inner, outer)
    tiles, n_inner, n_outer = blocks.inner // SIDE, pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer)
    x_RI, w = padded(x_RI, blocks.inner, -1), padded(w, blocks.inner, -1 if transposed else -2)
    scales = padded(x_scale.T, tiles).reshape(n_inner, tiles, rows)
    none = rows - count_E.sum(dtype=jnp.int32)  # a last group without weights, so that every row belongs to one
    work = make_work(jnp.append(count_E, none), rows, blocks.rows)
    iterations = blocks.outer // blocks.columns
    kind, unit = _kind(x_RI, w), _unit(x_RI) * _unit(w)
    keep_x, keep_w = kind == x_RI.dtype, kind == w.dtype and transposed
    last_column, last_tile = w_scale.shape[1 if transposed else 2] - 1, x_scale.shape[1] - 1

    def kernel(
        group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, x_scales: Any, w: Any, w_scales: Any, y: Any, *refs: Any
    ) -> None:
        j, s, k = (pl.program_id(axis) for axis in range(3))
        group, before = group_S[s], jnp.maximum(s - 1, 0)
        total, x_wide, w_wide = refs[:-2], x if keep_x else refs[-2], w if keep_w else refs[-1]

        def place(i: Any) -> tuple[Any, Any]:
            """Rows and columns of iteration i."""
            return aligned(lax.div(i, iterations), blocks.height), aligned(lax.rem(i, iterations), blocks.columns)

        def store(i: Any, value: Any) -> None:
            row = lax.broadcasted_iota(jnp.int32, (blocks.height, 1), 0)
            row = row + tile_S[s] * blocks.rows + lax.div(i, iterations) * blocks.height
            own = (row >= first_G[group]) & (row < end_G[group])
            y[place(i)] = jnp.where(own, value, y[place(i)].astype(jnp.float32)).astype(y.dtype)

        def each(body: Callable[[Any], None]) -> None:
            """For all columns of those rows of the tile among which are the group's."""
            first = jnp.maximum(first_G[group] - tile_S[s] * blocks.rows, 0)
            end = jnp.minimum(end_G[group] - tile_S[s] * blocks.rows, blocks.rows)
            low, high = lax.div(first, blocks.height), lax.div(end + blocks.height - 1, blocks.height)

            def some(i: Any, _: None) -> None:
                for n in range(blocks.unroll):
                    body(i * blocks.unroll + n)

            runs = iterations // blocks.unroll
            lax.fori_loop(low * runs, high * runs, some, None)

        def part(i: Any) -> jax.Array:
            """Row and column blocks' product, transposed while it is added up."""
            (rows_at, at), scale_at = place(i), lax.rem(i, iterations) * (blocks.columns // LANES)
            strips = [jnp.zeros((LANES, blocks.height), jnp.float32) for _ in range(blocks.columns // LANES)]
            for t in range(tiles):
                inner_at, tile = slice(t * SIDE, (t + 1) * SIDE), jnp.minimum(k * tiles + t, last_tile)
                scale = unit * x_scales[pl.ds(t, 1), rows_at]
                sums = dot(w_wide[at, inner_at], x_wide[rows_at, inner_at], 1, 1)
                for c in range(len(strips)):
                    n = jnp.minimum(j * (blocks.outer // LANES) + scale_at + c, last_column)
                    own = scale * (w_scales[n, tile] if transposed else w_scales[tile, n])
                    strips[c] += sums[c * LANES : (c + 1) * LANES] * own
            return jnp.concatenate([strip.T for strip in strips], axis=1)

        def add(i: Any) -> None:
            total[0][place(i)] = jnp.where(k > 0, total[0][place(i)], 0.0) + part(i)

        @pl.when(group < n_groups)
        def compute() -> None:
            anew = (s == 0) | (n_inner > 1)
            if not keep_x:
                pl.when(anew | (tile_S[before] != tile_S[s]))(lambda: _convert(x, x_wide))
            if not keep_w:
                pl.when(anew | (group_S[before] != group))(lambda: _convert(w, w_wide, transposed=not transposed))
            if n_inner == 1:
                return each(lambda i: store(i, part(i)))
            each(add)
            pl.when(k == n_inner - 1)(lambda: each(lambda i: store(i, total[0][place(i)])))

        @pl.when(group == n_groups)
        def clear() -> None:
            each(lambda i: store(i, jnp.zeros((blocks.height, blocks.columns), jnp.float32)))

    def weight_at(j: Any, s: Any, k: Any, group_S: Any, *_: Any) -> Any:
        group = jnp.minimum(group_S[s], n_groups - 1)
        return (group, j, k) if transposed else (group, k, j)

    def weight_scale_at(j: Any, s: Any, k: Any, group_S: Any, *_: Any) -> Any:
        return jnp.minimum(group_S[s], n_groups - 1), 0, 0

    sides = (blocks.outer, blocks.inner) if transposed else (blocks.inner, blocks.outer)
    y = result((rows, outer), dtype, x_RI, interpret)
    call = pl.pallas_call(
        kernel,
        out_shape=y,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(n_outer, work.size, n_inner),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.inner), lambda j, s, k, group_S, tile_S, *_: (tile_S[s], k)),
                pl.BlockSpec((None, tiles, blocks.rows), lambda j, s, k, group_S, tile_S, *_: (k, 0, tile_S[s])),
                pl.BlockSpec((None, *sides), weight_at),
                pl.BlockSpec((None, *w_scale.shape[1:]), weight_scale_at, memory_space=pltpu.SMEM),
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.outer), lambda j, s, k, group_S, tile_S, *_: (tile_S[s], j)),
            scratch_shapes=[
                *[pltpu.VMEM((blocks.rows, blocks.outer), jnp.float32)][: n_inner - 1],
                pltpu.VMEM((PACKED, LANES) if keep_x else (blocks.rows, blocks.inner), kind),
                pltpu.VMEM((PACKED, LANES) if keep_w else (blocks.outer, blocks.inner), kind),
            ],
        ),
        compiler_params=_compiler(blocks, ("parallel", "arbitrary", "arbitrary")),
        cost_estimate=estimate(2 * rows * inner * outer, x_RI, x_scale, w, w_scale, y),
        name=name,
        interpret=interpret,
    )
    return call(*work[:4], x_RI, scales, w, w_scale)


def outer_products(
    a: Tiled, b: Tiled, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any, blocks: Blocks | None = None
) -> jax.Array:
    """As `call.OuterProducts`."""
    (x_IR, x_scale), (y_RO, y_scale) = a, b
    (inner, rows), outer, n_groups = x_IR.shape, y_RO.shape[1], count_E.shape[0]
    blocks = fit_outer(blocks or blocks_of(chip())[1], rows, inner, outer)
    height, columns, tiles = blocks.height, blocks.columns, blocks.rows // SIDE
    work = make_work(count_E, rows, blocks.rows, empty=True)
    n_columns, n_heights = blocks.outer // columns, blocks.inner // height
    turns = n_columns // blocks.unroll
    share = up(-(-height // turns), SUBLANES)
    kind, unit = _kind(x_IR, y_RO), _unit(x_IR) * _unit(y_RO)
    as_it_is = kind == x_IR.dtype
    steps = LANES // tiles  # whose scales of x come together, LANES of them

    def kernel(
        group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, x_scales: Any, y: Any, y_scales: Any, w: Any,
        total: Any, own_scales: Any, x_scales_wide: Any, *wide: Any,
    ) -> None:  # fmt: skip
        s = pl.program_id(2)
        group = group_S[s]
        first = (s == 0) | (group_S[jnp.maximum(s - 1, 0)] != group)
        last = group_S[jnp.minimum(s + 1, work.group_S.shape[0] - 1)] != group
        x_wide, y_wide = (x, y) if as_it_is else wide
        if not as_it_is:
            _convert(x, x_wide)
            _convert(y, y_wide)
        for i in range(n_heights):
            at = slice(i * height, (i + 1) * height)
            # Which of the lanes are this step's is known at run time only; rolled to the front, their places are known.
            own_scales[at, :] = unit * pltpu.roll(x_scales[at, :], LANES - lax.rem(tile_S[s], steps) * tiles, 1)
        start = tile_S[s] * blocks.rows
        whole = (start >= first_G[group]) & (start + blocks.rows <= end_G[group])  # nothing of another group

        def spread(row: Any, n: int) -> None:
            """The scales of n rows over lanes, once for all columns."""
            at = pl.ds(pl.multiple_of(row, SUBLANES), n)
            for t in range(tiles):
                x_scales_wide[t, at, :] = jnp.broadcast_to(own_scales[at, t : t + 1], (n, LANES))

        def add(masked: bool, strip: Any, column: Any) -> None:
            at = aligned(strip, height), aligned(column, columns)
            for t in range(tiles):
                along = slice(t * SIDE, (t + 1) * SIDE)
                sums = dot(x_wide[at[0], along], y_wide[along, at[1]], 1, 0)
                x_scale = jnp.concatenate([x_scales_wide[t, at[0], :]] * (columns // LANES), axis=1)
                sums = sums * x_scale * y_scales[t, :, at[1]]
                own = (start + t * SIDE >= first_G[group]) & (start + t * SIDE < end_G[group])
                before = total[at] if t else jnp.where(first, 0.0, total[at])
                total[at] = before + (jnp.where(own, sums, 0.0) if masked else sums)

        def some(masked: bool, i: Any, _: None) -> None:
            """A few columns of a strip of rows, and a share of the next strip's scales, while the matrix units are busy."""
            strip, turn = lax.div(i, turns), lax.rem(i, turns)
            for n in range(blocks.unroll):
                add(masked, strip, turn * blocks.unroll + n)
            following = jnp.minimum(strip + 1, n_heights - 1) * height
            spread(following + jnp.minimum(turn * share, height - share), share)

        def store(i: Any, _: None) -> None:
            at = aligned(lax.div(i, n_columns), height), aligned(lax.rem(i, n_columns), columns)
            w[at] = total[at].astype(w.dtype)

        spread(0, height)
        for masked, when in ((False, whole), (True, ~whole)):
            pl.when(when)(partial(lax.fori_loop, 0, n_heights * turns, partial(some, masked), None))
        pl.when(last)(lambda: lax.fori_loop(0, n_heights * n_columns, store, None))

    sums = result((n_groups, inner, outer), dtype, x_IR, interpret)
    wide = [(blocks.inner, blocks.rows), (blocks.rows, blocks.outer)]
    call = pl.pallas_call(
        kernel,
        out_shape=sums,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer), work.size),
            in_specs=[
                pl.BlockSpec((blocks.inner, blocks.rows), lambda i, j, s, group_S, tile_S, *_: (i, tile_S[s])),
                pl.BlockSpec((blocks.inner, LANES), lambda i, j, s, group_S, tile_S, *_: (i, lax.div(tile_S[s], steps))),
                pl.BlockSpec((blocks.rows, blocks.outer), lambda i, j, s, group_S, tile_S, *_: (tile_S[s], j)),
                pl.BlockSpec((tiles, 1, blocks.outer), lambda i, j, s, group_S, tile_S, *_: (tile_S[s], 0, j)),
            ],
            out_specs=pl.BlockSpec((None, blocks.inner, blocks.outer), lambda i, j, s, group_S, *_: (group_S[s], i, j)),
            scratch_shapes=[
                pltpu.VMEM((blocks.inner, blocks.outer), jnp.float32),
                pltpu.VMEM((blocks.inner, LANES), jnp.float32),
                pltpu.VMEM((tiles, blocks.inner, LANES), jnp.float32),
                *(pltpu.VMEM((PACKED, LANES) if as_it_is else shape, kind) for shape in wide),
            ],
        ),
        compiler_params=_compiler(blocks, ("parallel", "parallel", "arbitrary")),
        cost_estimate=estimate(2 * rows * inner * outer, x_IR, x_scale, y_RO, y_scale, sums),
        name=name,
        interpret=interpret,
    )
    return call(*work[:4], x_IR, padded(x_scale, LANES, -1), y_RO, y_scale[:, None, :])


def _kind(a: jax.Array, b: jax.Array) -> Any:
    """What they are multiplied as."""
    return a.dtype if a.dtype == b.dtype and chip() in FP8 else jnp.dtype(jnp.bfloat16)


def _unit(x: jax.Array) -> int:
    """What its numbers are multiples of, once they are converted."""
    return 16 if x.dtype == jnp.float8_e4m3fn and chip() not in FP8 else 1


def _convert(narrow: Any, wide: Any, transposed: bool = False) -> None:
    """All of a block."""

    def some(i: Any, _: None) -> None:
        at = aligned(i, PACKED)
        wide[at, :] = _widened(narrow[at, :])

    def turn(i: Any, _: None) -> None:
        at = aligned(i, SIDE)
        wide[:, at] = _widened(narrow[at, :]).T.astype(wide.dtype)

    step = SIDE if transposed else PACKED
    lax.fori_loop(0, narrow.shape[0] // step, turn if transposed else some, None)


def _widened(x: jax.Array) -> jax.Array:
    """x over its unit, in bfloat16.

    What chips without FP8 read in one instruction is another e4m3, with exponents 4 less; -0 is its NaN, and it has no other.
    """
    if _unit(x) == 1:
        return x.astype(jnp.bfloat16)
    word = pltpu.bitcast(x, jnp.int32)  # four of them
    ones, low = jnp.int32(0x01010101), jnp.int32(0x7F7F7F7F)
    size = word & low
    some, nan = size + low, size + ones  # whose bytes' highest bits say: not 0; NaN
    word = (word & (some ^ nan | low)) + (lax.shift_right_logical(nan, 7) & ones)  # 0 and NaN lose their sign, NaN becomes -0
    return pltpu.bitcast(word, jnp.float8_e4m3b11fnuz).astype(jnp.float32).astype(jnp.bfloat16)


def _compiler(blocks: Blocks, dimensions: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=blocks.vmem_mib * MIB)
