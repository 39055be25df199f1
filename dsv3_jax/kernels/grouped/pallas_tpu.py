"""The grouped products on TPU's matrix units.

The grid walks blocks of the output's columns, then the list of (group, tile of rows), then the contraction: a group's weights
are read once, and a tile of rows once for each block of columns. Where a tile holds rows of several groups, each writes its own
and leaves the others, while the tile stays in VMEM. Within a step loops over parts of the tile, as high as there are rows of
the group for, leave out those without one.

What lies beyond an operand's edge is undefined, and so are rows between the groups' and the end: products keep rows apart, so
they meet nothing there; sums over rows or over a ragged contraction select what is theirs first, on both sides, since 0 * NaN
is NaN.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped.call import PARTIAL, Epilogue, Out
from dsv3_jax.kernels.grouped.grid_tpu import SUBLANES, call, cut
from dsv3_jax.kernels.grouped.work import make_work
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import LANES, dot, estimate, fitted, up


class Blocks(NamedTuple):
    """Of a product [R, I] x [I, O]: rows, contraction and columns in VMEM; rows and columns of one iteration."""

    rows: int
    inner: int
    outer: int
    height: int
    columns: int
    least: int  # rows of an iteration where fewer are left of a group, see `pieces_of`
    streamed: bool = False  # see `grid_tpu.call`
    vmem_mib: int = 62
    depth: int | None = None  # most of the contraction at once, between whose parts sums wait in VMEM; None: all of it
    turned: bool = False  # transposed weights are turned in VMEM, once for all of a group's rows

    @property
    def pieces(self) -> tuple[int, ...]:
        return pieces_of(self.height, self.least)

    @property
    def cuts(self) -> list[int]:
        """Of the contraction, the ends of its parts."""
        return [*range(0, self.inner, self.depth or self.inner), self.inner]

    @property
    def turns(self) -> int:
        """Parts that transposed weights are turned in; 0: they are multiplied as they are."""
        part = math.gcd(self.inner, TURN)
        return self.inner // part if self.turned and part % LANES == self.outer % LANES == 0 else 0


class OuterBlocks(NamedTuple):
    """Of a product [R, I]^T x [R, O]: rows, and the most of each side, in VMEM; all of it is multiplied at once."""

    rows: int
    inner: int
    outer: int
    least: int  # rows at once of a tile in which a group begins or ends
    streamed: bool = False
    vmem_mib: int = 48
    turned: bool = False  # the left side is turned in VMEM first, where it is whole tiles

    @property
    def pieces(self) -> tuple[int, ...]:
        return pieces_of(self.rows, self.least) or (self.rows,)

    @property
    def turns(self) -> bool:
        return self.turned and all(side % LANES == 0 for side in (self.inner, self.rows, *self.pieces))


def pieces_of(height: int, least: int) -> tuple[int, ...]:
    """Ever fewer rows than `height`, by halves while those are multiples of the least."""
    found: list[int] = []
    while height > least:
        height = height // 2 if height // 2 % least == 0 else least
        found.append(height)
    return tuple(found)


class Chip(NamedTuple):
    """A kind of device's blocks. `products`: by whether weights are transposed, and whether the contraction is a long one."""

    products: dict[tuple[bool, bool], Blocks]
    several: Blocks  # of two weights at once
    outer: OuterBlocks


# What needed the fewest bundles of those tried at V3's shapes, see `experiments.bench_kernels`; other chips as v5p. There sums
# of 320 x 128 are in registers, 64 of 8 x 128, and leave room for operands, and to bring along transposed weights takes the
# units twice as long. On v6e, whose units take 256 columns and transposed weights as they are, sums wait in VMEM between parts
# of the contraction. Those of tpu7x add up by themselves.
TURN = 1024  # most of the contraction of which weights are turned at once
LONG, WIDE = 4096, 3  # contractions above this, extras and outputs as wide as the product
TALL = Blocks(1024, 7168, 512, 512, 512, least=128)
NARROW = Blocks(1280, 7168, 256, 320, 128, least=80, turned=True)
NARROW_SHORT = NARROW._replace(rows=1024, height=512, least=128)
V5P = Chip(
    {(side, long): NARROW if long else NARROW_SHORT for side in (False, True) for long in (False, True)},
    NARROW,
    OuterBlocks(512, 1024, 2048, least=128, turned=True),
)
V6E_LONG = TALL._replace(height=1024, streamed=True, depth=512)
V6E_SHORT = V6E_LONG._replace(outer=1024, columns=1024)
V6E = Chip(
    {
        (False, True): V6E_LONG._replace(depth=256),
        (False, False): V6E_SHORT,
        (True, True): V6E_LONG,
        (True, False): V6E_SHORT,
    },
    Blocks(512, 7168, 256, 512, 256, least=128, depth=256),
    OuterBlocks(512, 1792, 2048, least=256, streamed=True),
)
TPU7X_LONG = TALL._replace(height=1024, streamed=True, turned=True)
TPU7X_SHORT = TPU7X_LONG._replace(outer=1024)
TPU7X = Chip(
    {(side, long): TPU7X_LONG if long else TPU7X_SHORT for side in (False, True) for long in (False, True)},
    TALL._replace(rows=512, streamed=True),
    OuterBlocks(512, 1024, 2048, least=512, streamed=True),
)
CHIPS = {"TPU v6 lite": V6E, "TPU7x": TPU7X}


class Place(NamedTuple):
    """Where a part of a tile is: its first row, how many it has, and which of the block's columns."""

    row: Any
    height: int
    column: Any


def blocks_of(kind: str, weights: int, transposed: bool, inner: int, wide: int) -> Blocks:
    """Of a product with so many weights at once, on this kind of device; `wide`: extras and outputs as wide as the product."""
    chip = CHIPS.get(kind, V5P)
    blocks = chip.several if weights > 1 else chip.products[transposed, inner > LONG]
    if wide <= WIDE or weights > 1:
        return blocks
    rows = blocks.rows // 2  # in VMEM extras and outputs are beside the operands, each twice
    return blocks._replace(rows=rows, height=min(rows, blocks.height))


def of_float32(blocks: Blocks, weights: int) -> Blocks:
    """Those that fit VMEM with numbers of twice the bytes, and what is spilled of them."""
    most, outer, columns = TALL.rows // 2 // weights, min(blocks.outer, TALL.outer // 2), min(blocks.columns, LANES)
    height = min(blocks.height, most)
    rows, least = min(blocks.rows, most // height * height), blocks.least if height % blocks.least == 0 else height
    return blocks._replace(rows=rows, outer=outer, height=height, columns=columns, least=least)


def outer_blocks_of(kind: str) -> OuterBlocks:
    return CHIPS.get(kind, V5P).outer


def fit_products(blocks: Blocks, rows: int, inner: int, outer: int) -> Blocks:
    """No larger than the operands of [R, I] x [I, O]."""
    (tall, height), (wide, columns) = (
        fitted(rows, blocks.rows, blocks.height, SUBLANES), fitted(outer, blocks.outer, blocks.columns, 1)
    )  # fmt: skip
    least = blocks.least if height == blocks.height else height
    return blocks._replace(rows=tall, inner=min(inner, blocks.inner), outer=wide, height=height, columns=columns, least=least)


def fit_outer(blocks: OuterBlocks, rows: int, inner: int, outer: int) -> OuterBlocks:
    """No larger than the operands of [R, I]^T x [R, O], whose sides are cut evenly."""
    deep, wide = (
        side if side <= most else up(pl.cdiv(side, pl.cdiv(side, most)), LANES)
        for side, most in ((inner, blocks.inner), (outer, blocks.outer))
    )
    tall = min(blocks.rows, up(rows, SUBLANES))
    return blocks._replace(rows=tall, inner=deep, outer=wide, least=blocks.least if tall == blocks.rows else tall)


def products(
    x_RI: jax.Array,
    weights: Sequence[jax.Array],
    extras: Sequence[jax.Array],
    count_E: jax.Array,
    outs: Sequence[Out],
    epilogue: Epilogue,
    *,
    transposed: bool,
    name: str,
    interpret: Any,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, ...]:
    """As `call.Products`."""
    (rows, inner), n_groups = x_RI.shape, weights[0].shape[0]
    outer = weights[0].shape[1 if transposed else 2]
    wide = sum(v.shape[1] > 1 for v in extras) + len(outs)
    blocks = blocks or blocks_of(chip(), len(weights), transposed, inner, wide)
    if x_RI.dtype == jnp.float32:
        blocks = of_float32(blocks, len(weights))
    blocks = fit_products(blocks, rows, inner, outer)
    n_inner, n_outer = pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer)
    none = rows - count_E.sum(dtype=jnp.int32)  # a last group without weights, so that every row belongs to one
    work = make_work(jnp.append(count_E, none), rows, blocks.rows)
    partial_columns = PARTIAL if blocks.columns % PARTIAL == 0 else blocks.columns
    n_columns = [partial_columns if out.partial else blocks.columns for out in outs]
    iterations = blocks.outer // blocks.columns
    n_sums = len(weights) if len(weights) > 1 or n_inner > 1 else 0  # else a product goes straight to the epilogue
    n_turned = len(weights) if transposed and blocks.turns else 0
    as_is = transposed and not n_turned

    def kernel(group_S: Any, tile_S: Any, first_G: Any, end_G: Any, x: Any, *refs: Any) -> None:
        ws, more, ys, sums, turned, waiting = cut(refs, len(weights), len(extras), len(outs), n_sums, n_turned)
        j, s, k = (pl.program_id(axis) for axis in range(3))
        group = group_S[s]

        def place(at: Place, width: int) -> tuple[Any, Any]:
            return pl.ds(at.row, at.height), _columns(at.column, width)

        def store(at: Place, values: Sequence[Any]) -> None:
            row = lax.broadcasted_iota(jnp.int32, (at.height, 1), 0) + tile_S[s] * blocks.rows + at.row
            own = (row >= first_G[group]) & (row < end_G[group])
            for y, value, width in zip(ys, values, n_columns, strict=True):
                y_at = place(at, width)
                y[y_at] = jnp.where(own, value, y[y_at].astype(jnp.float32)).astype(y.dtype)

        def finish(at: Place, totals: Sequence[Any]) -> None:
            rows_at, columns_at = place(at, blocks.columns)
            beside = [v[rows_at, slice(None) if v.shape[1] == 1 else columns_at].astype(jnp.float32) for v in more]
            if outer % blocks.outer:  # partial sums take columns together
                column = lax.broadcasted_iota(jnp.int32, (1, blocks.columns), 1)
                within = column + j * blocks.outer + at.column * blocks.columns < outer
                totals, beside = ([jnp.where(within, v, 0.0) for v in values] for values in (totals, beside))
            values = epilogue(totals, beside)
            store(at, [_folded(value, width) for value, width in zip(values, n_columns, strict=True)])

        def each(heights: Sequence[int], body: Callable[[Place], None]) -> None:
            """For all columns of those rows of the tile among which are the group's, in as few and as high parts as will do."""
            first = jnp.maximum(first_G[group] - tile_S[s] * blocks.rows, 0)
            end = jnp.minimum(end_G[group] - tile_S[s] * blocks.rows, blocks.rows)
            _walk(first, end, heights, iterations, body)

        def part(w: Any, at: Place) -> jax.Array:
            rows_at, columns_at = place(at, blocks.columns)
            total: Any = None
            for start, end in pairwise(blocks.cuts):
                a, b = x[rows_at, start:end], w[columns_at, start:end] if as_is else w[start:end, columns_at]
                left = inner - k * blocks.inner - start if inner % blocks.inner else None
                product = _product(a, b, left, transposed=as_is)
                total = product if total is None else waiting[0][: at.height, :] + product
                if end < blocks.inner:
                    waiting[0][: at.height, :] = total
            return total

        def turn() -> None:
            fresh = (n_inner > 1) | (s == 0) | (group_S[jnp.maximum(s - 1, 0)] != group)
            depth = blocks.inner // blocks.turns

            def run(i: Any, _: None) -> None:
                for w, to in zip(ws, turned, strict=True):
                    to[_columns(i, depth), :] = w[:, _columns(i, depth)].T

            lax.fori_loop(0, jnp.where(fresh, blocks.turns, 0), run, None)

        def add(w: Any, total: Any, at: Place) -> None:
            total_at = place(at, blocks.columns)
            total[total_at] = part(w, at) if n_inner == 1 else jnp.where(k > 0, total[total_at], 0.0) + part(w, at)

        @pl.when(group < n_groups)
        def compute() -> None:
            heights, sides = (blocks.height, *blocks.pieces), turned or ws
            if turned:
                turn()
            if not sums:
                return each(heights, lambda at: finish(at, [part(sides[0], at)]))
            for w, total in zip(sides, sums, strict=True):  # one after the other: registers hold the sums of one
                each(heights, partial(add, w, total))
            pl.when(k == n_inner - 1)(
                lambda: each(heights, lambda at: finish(at, [total[place(at, blocks.columns)] for total in sums]))
            )

        @pl.when(group == n_groups)
        def clear() -> None:
            each([blocks.height], lambda at: store(at, [jnp.zeros((at.height, width), jnp.float32) for width in n_columns]))

    def x_at(j: Any, s: Any, k: Any, group_S: Any, tile_S: Any, *_: Any) -> Any:
        return tile_S[s], k

    def weight_at(j: Any, s: Any, k: Any, group_S: Any, *_: Any) -> Any:
        group = jnp.minimum(group_S[s], n_groups - 1)
        return (group, j, k) if transposed else (group, k, j)

    def row_at(j: Any, s: Any, k: Any, group_S: Any, tile_S: Any, *_: Any) -> Any:
        return tile_S[s], j

    def first_at(j: Any, s: Any, k: Any, group_S: Any, tile_S: Any, *_: Any) -> Any:
        return tile_S[s], 0

    sides = (blocks.outer, blocks.inner) if transposed else (blocks.inner, blocks.outer)
    shapes = [(rows, n_outer * iterations * partial_columns if out.partial else outer) for out in outs]
    results = [result(shape, out.dtype, x_RI, interpret) for shape, out in zip(shapes, outs, strict=True)]
    one, row = pl.BlockSpec((blocks.rows, 1), first_at), pl.BlockSpec((blocks.rows, blocks.outer), row_at)
    ins = [
        pl.BlockSpec((blocks.rows, blocks.inner), x_at),
        *(pl.BlockSpec((None, *sides), weight_at) for _ in weights),
        *(one if v.shape[1] == 1 else row for v in extras),
    ]
    found = call(
        kernel,
        (n_outer, work.size, n_inner),
        ("parallel", "arbitrary", "arbitrary"),
        (work[:4], [x_RI, *weights, *extras], results),
        (ins, [pl.BlockSpec((blocks.rows, iterations * width), row_at) for width in n_columns]),
        [
            *[pltpu.VMEM((blocks.rows, blocks.outer), jnp.float32)] * n_sums,
            *[pltpu.VMEM((blocks.inner, blocks.outer), x_RI.dtype)] * n_turned,
            *[pltpu.VMEM((blocks.height, blocks.columns), jnp.float32)] * (len(blocks.cuts) > 2),
        ],
        streamed=blocks.streamed,
        vmem_mib=blocks.vmem_mib,
        cost_estimate=estimate(2 * rows * inner * outer * len(weights), x_RI, *weights, *extras, *results),
        name=name,
        interpret=interpret,
    )
    return tuple(found)


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

        _when(whole, add_all)
        _walk(first, jnp.where(whole, first, end), blocks.pieces, 1, add_own)
        _when(closes & ~empty, store)
        _when(empty, clear)

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


def _walk(first: Any, end: Any, heights: Sequence[int], times: int, body: Callable[[Place], None]) -> None:
    """`body` so many times for each part of the rows from first to end, if any, in as few and as high parts as will do."""
    least = heights[-1]
    row = lax.div(first, least) * least
    end = jnp.where(first < end, end, row)
    for height in heights:
        parts = lax.div(end - row + least - 1, height)

        def run(i: Any, _: None, row: Any = row, height: int = height) -> None:
            body(Place(pl.multiple_of(row + lax.div(i, times) * height, least), height, lax.rem(i, times)))

        lax.fori_loop(0, parts * times, run, None)
        row = row + parts * height


def _when(condition: Any, body: Callable[[Any, None], None]) -> None:
    """As a loop of one turn at most: a program's loops are counted apart, branches are not."""
    lax.fori_loop(0, condition.astype(jnp.int32), body, None)


def _folded(values: jax.Array, width: int) -> jax.Array:
    """Every `width` columns, added up."""
    first, *others = (values[:, start : start + width] for start in range(0, values.shape[1], width))
    return sum(others, start=first)


def _columns(i: Any, width: int) -> Any:
    start = i * width
    return pl.ds(pl.multiple_of(start, width) if width % LANES == 0 else start, width)


def _product(a: jax.Array, b: jax.Array, left: Any, *, transposed: bool) -> jax.Array:
    """Of the contraction what is within the operands: all of it, or `left`."""
    axis = int(transposed)
    if left is not None:
        a, b = (
            jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, along) < left, v, jnp.zeros((), v.dtype))
            for v, along in ((a, 1), (b, axis))
        )
    return dot(a, b, 1, axis)
