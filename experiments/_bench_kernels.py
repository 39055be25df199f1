"""The kernels that `bench_kernels` compiles, at DeepSeek-V3's shapes: what they are called with, and how often their loops run.

Peers are kernels that ship with JAX, for the same operands, in the best of a few block sizes: all of the contraction at once,
where they have no branches that a count of bundles would have to weigh.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from dsv3_jax.kernels.grouped import cost, pallas_tpu
from dsv3_jax.kernels.grouped.call import Out

BF16 = jnp.dtype(jnp.bfloat16)
HIDDEN, WIDTH = 7168, 2048
COUNTS = (4301, 3688, 4535, 3902, 4120, 3577, 4646, 3999)  # rows of 8 experts of one rank: the choices of 4,096 tokens
ROWS, EXPERTS = sum(COUNTS), len(COUNTS)
GMM = (512, 512), (512, 256), (256, 512), (1024, 256)  # rows, columns
TGMM = (512, 1024, 1024), (512, 512, 1024), (512, 1024, 512), (1024, 512, 512)


class Case(NamedTuple):
    kernel: str
    program: str  # the name that the compiled program bears
    shape: str
    run: Callable[..., Any]
    operands: tuple[jax.ShapeDtypeStruct, ...]
    cost: cost.Cost
    blocks: tuple[int, ...]
    peer: bool = False


def cases(kind: str) -> list[Case]:
    """For this kind of device, ours and then its peers."""
    found = [
        *_product("grouped_up", kind, HIDDEN, WIDTH, transposed=False),
        *_product("grouped_down", kind, WIDTH, HIDDEN, transposed=False),
        *_product("grouped_up_transposed", kind, WIDTH, HIDDEN, transposed=True),
        *_product("grouped_down_transposed", kind, HIDDEN, WIDTH, transposed=True),
        _swiglu(kind),
        *_outer(kind),
    ]
    return found


def _array(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


GROUPS = _array(EXPERTS, dtype=jnp.int32)


def _product(name: str, kind: str, inner: int, outer: int, *, transposed: bool) -> list[Case]:
    blocks = pallas_tpu.blocks_of(kind, 1, transposed)
    ours = cost.of_products(COUNTS, ROWS, inner, outer, blocks, weights=1, wide_extras=0, outs=1)
    weight = _array(EXPERTS, *((outer, inner) if transposed else (inner, outer)))
    shape, operands = f"{ROWS}x{inner}x{outer}", (_array(ROWS, inner), weight, GROUPS)

    def run(x: Any, w: Any, count: Any) -> Any:
        return pallas_tpu.products(
            x, [w], [], count, [Out(BF16)], lambda products, extras: products,
            transposed=transposed, name=name, interpret=False, blocks=blocks,
        )  # fmt: skip

    def peer(tiles: tuple[int, int, int], x: Any, w: Any, count: Any) -> Any:
        return gmm(x, w, count, BF16, tiles, transpose_rhs=transposed)

    found = [Case(name, name, shape, run, operands, ours, blocks)]
    for rows, columns in GMM:
        steps = -(-outer // columns) * _tiles(rows)
        theirs = ours._replace(steps=steps, trips=(), flops=2 * steps * rows * inner * columns)
        tiles = (rows, inner, columns)
        found.append(Case(name, "gmm", shape, partial(peer, tiles), operands, theirs, tiles, peer=True))
    return found


def _swiglu(kind: str) -> Case:
    blocks = pallas_tpu.blocks_of(kind, 2, False)
    ours = cost.of_products(COUNTS, ROWS, HIDDEN, WIDTH, blocks, weights=2, wide_extras=0, outs=3)
    weight = _array(EXPERTS, HIDDEN, WIDTH)
    operands = (_array(ROWS, HIDDEN), weight, weight, _array(ROWS, 1, dtype=jnp.float32), GROUPS)

    def epilogue(products: Any, extras: Any) -> Any:
        (g, u), (gates,) = products, extras
        return g, u, jax.nn.silu(g) * u * gates

    def run(x: Any, gate: Any, up: Any, gates: Any, count: Any) -> Any:
        return pallas_tpu.products(
            x, [gate, up], [gates], count, [Out(BF16)] * 3, epilogue,
            transposed=False, name="grouped_swiglu", interpret=False, blocks=blocks,
        )  # fmt: skip

    return Case("grouped_swiglu", "grouped_swiglu", f"{ROWS}x{HIDDEN}x2x{WIDTH}", run, operands, ours, blocks)


def _outer(kind: str) -> list[Case]:
    blocks = pallas_tpu.outer_blocks_of(kind)
    ours = cost.of_outer(COUNTS, ROWS, HIDDEN, WIDTH, blocks)
    shape, operands = f"{HIDDEN}x{ROWS}x{WIDTH}", (_array(ROWS, HIDDEN), _array(ROWS, WIDTH), GROUPS)

    def run(x: Any, y: Any, count: Any) -> Any:
        return pallas_tpu.outer_products(x, y, count, dtype=BF16, name="grouped_outer", interpret=False, blocks=blocks)

    def peer(tiles: tuple[int, int, int], x: Any, y: Any, count: Any) -> Any:
        return tgmm(x.T, y, count, BF16, tiles)

    found = [Case("grouped_outer", "grouped_outer", shape, run, operands, ours, blocks)]
    for tiles in TGMM:
        steps = -(-HIDDEN // tiles[1]) * -(-WIDTH // tiles[2]) * _tiles(tiles[0])
        theirs = ours._replace(steps=steps, trips=(), flops=2 * steps * tiles[0] * tiles[1] * tiles[2])
        found.append(Case("grouped_outer", "tgmm", shape, partial(peer, tiles), operands, theirs, tiles, peer=True))
    return found


def _tiles(rows: int) -> int:
    """(group, tile) pairs."""
    ends = [sum(COUNTS[: e + 1]) for e in range(EXPERTS)]
    return sum(-(-end // rows) - (end - n) // rows for end, n in zip(ends, COUNTS, strict=True))
