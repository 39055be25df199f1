"""Blocks of the grouped products on TPU: what of the operands is in VMEM, and what of that in one iteration, for each chip."""

import math
from typing import NamedTuple

from jax.experimental import pallas as pl

from dsv3_jax.kernels.tiles import LANES, SUBLANES_BF16, fitted, up


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
        fitted(rows, blocks.rows, blocks.height, SUBLANES_BF16), fitted(outer, blocks.outer, blocks.columns, 1)
    )  # fmt: skip
    least = blocks.least if height == blocks.height else height
    return blocks._replace(rows=tall, inner=min(inner, blocks.inner), outer=wide, height=height, columns=columns, least=least)


def fit_outer(blocks: OuterBlocks, rows: int, inner: int, outer: int) -> OuterBlocks:
    """No larger than the operands of [R, I]^T x [R, O], whose sides are cut evenly."""
    deep, wide = (
        side if side <= most else up(pl.cdiv(side, pl.cdiv(side, most)), LANES)
        for side, most in ((inner, blocks.inner), (outer, blocks.outer))
    )
    tall = min(blocks.rows, up(rows, SUBLANES_BF16))
    return blocks._replace(rows=tall, inner=deep, outer=wide, least=blocks.least if tall == blocks.rows else tall)
