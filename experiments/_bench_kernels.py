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

from dsv3_jax.fp8.quantize import Quantiser
from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.kernels.decode.api import decode_attention, paged_decode_attention
from dsv3_jax.kernels.grouped import pallas_tpu
from dsv3_jax.kernels.grouped.api import grouped_swiglu
from dsv3_jax.kernels.grouped.call import Out
from dsv3_jax.kernels.grouped.cost import Cost, entries_of, of_outer, of_products
from dsv3_jax.kernels.quantise.api import quantise, requantise_transposed, swiglu_quantise
from dsv3_jax.kernels.router.api import choose
from dsv3_jax.presets import preset

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
    cost: Cost | None = None  # None: the loops' trips are not counted
    blocks: tuple[int, ...] = ()
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
        *_attention(4096),
        *_attention(32768),
        *_decode(4096),
        *_decode(32768),
        _router(),
        *_quantise(),
    ]
    return found


def _array(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


GROUPS = _array(EXPERTS, dtype=jnp.int32)


def _product(name: str, kind: str, inner: int, outer: int, *, transposed: bool) -> list[Case]:
    blocks = pallas_tpu.blocks_of(kind, 1, transposed)
    ours = of_products(COUNTS, ROWS, inner, outer, blocks, weights=1, wide_extras=0, outs=1)
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
        steps = -(-outer // columns) * len(entries_of(COUNTS, rows))
        theirs = ours._replace(steps=steps, trips=(), flops=2 * steps * rows * inner * columns)
        tiles = (rows, inner, columns)
        found.append(Case(name, "gmm", shape, partial(peer, tiles), operands, theirs, tiles, peer=True))
    return found


def _swiglu(kind: str) -> Case:
    blocks = pallas_tpu.blocks_of(kind, 2, False)
    ours = of_products(COUNTS, ROWS, HIDDEN, WIDTH, blocks, weights=2, wide_extras=0, outs=3)
    weight = _array(EXPERTS, HIDDEN, WIDTH)
    down = _array(EXPERTS, WIDTH, HIDDEN)
    operands = (_array(ROWS, HIDDEN), _array(ROWS, dtype=jnp.float32), weight, weight, down, GROUPS)

    def run(x: Any, gates: Any, gate: Any, up: Any, down: Any, count: Any) -> Any:
        return grouped_swiglu(x, gates, gate, up, down, count, implementation=TPU)

    return Case("grouped_swiglu", "grouped_swiglu", f"{ROWS}x{HIDDEN}x2x{WIDTH}", run, operands, ours, blocks)


def _outer(kind: str) -> list[Case]:
    blocks = pallas_tpu.outer_blocks_of(kind)
    ours = of_outer(COUNTS, ROWS, HIDDEN, WIDTH, blocks)
    shape, operands = f"{HIDDEN}x{ROWS}x{WIDTH}", (_array(ROWS, HIDDEN), _array(ROWS, WIDTH), GROUPS)

    def run(x: Any, y: Any, count: Any) -> Any:
        return pallas_tpu.outer_products(x, y, count, dtype=BF16, name="grouped_outer", interpret=False, blocks=blocks)

    def peer(tiles: tuple[int, int, int], x: Any, y: Any, count: Any) -> Any:
        return tgmm(x.T, y, count, BF16, tiles)

    found = [Case("grouped_outer", "grouped_outer", shape, run, operands, ours, blocks)]
    for tiles in TGMM:
        steps = -(-HIDDEN // tiles[1]) * -(-WIDTH // tiles[2]) * len(entries_of(COUNTS, tiles[0]))
        theirs = ours._replace(steps=steps, trips=(), flops=2 * steps * tiles[0] * tiles[1] * tiles[2])
        found.append(Case("grouped_outer", "tgmm", shape, partial(peer, tiles), operands, theirs, tiles, peer=True))
    return found


TPU = "pallas_tpu"
HEADS, CONTENT, ROPE = 128, 128, 64


def _attention(length: int) -> list[Case]:
    heads = _array(1, HEADS, length, CONTENT)
    operands = (heads, _array(1, HEADS, length, ROPE), heads, _array(1, length, ROPE), heads)
    shape = f"{HEADS}x{length}x({CONTENT}+{ROPE},{CONTENT})"

    def forward(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any) -> Any:
        return mla_attention(q, q_rope, k, k_rope, v, None, 0.1, implementation=TPU)

    def both(*arrays: Any) -> Any:
        return jax.vjp(forward, *arrays)[1](arrays[4])

    return [Case("attention", "mla_attention", shape, forward, operands),
            Case("attention_backward", "mla_attention_backward", shape, both, operands)]  # fmt: skip


def _decode(length: int) -> list[Case]:
    batch, width, page = 32, 640, 64  # a row of 576 lies in 640 lanes
    q, lengths = _array(batch, 1, HEADS, 512 + ROPE), _array(batch, dtype=jnp.int32)
    pages, table = _array(batch * length // page, page, width), _array(batch, length // page, dtype=jnp.int32)

    def contiguous(q: Any, cache: Any, lengths: Any) -> Any:
        return decode_attention(q, cache, lengths, latent=512, scale=0.1, implementation=TPU)

    def paged(q: Any, cache: Any, table: Any, lengths: Any) -> Any:
        return paged_decode_attention(q, cache, table, lengths, latent=512, scale=0.1, implementation=TPU)

    shape = f"{batch}x{HEADS}x{length}"
    return [Case("decode", "decode", shape, contiguous, (q, _array(batch, length, width), lengths)),
            Case("decode_paged", "decode_paged", shape, paged, (q, pages, table, lengths))]  # fmt: skip


def _router() -> Case:
    config, experts = preset("deepseek_v3_671b").model, 256

    def run(logits: Any, bias: Any) -> Any:
        return choose(logits, bias, config, implementation=TPU)

    operands = (_array(ROWS, experts, dtype=jnp.float32), _array(experts, dtype=jnp.float32))
    return Case("router", "router", f"{ROWS}x{experts}", run, operands)


def _quantise() -> list[Case]:
    def tiles(tile: tuple[int, int], x: Any) -> Any:
        return quantise(x, Quantiser(tile=tile), implementation=TPU)

    def swiglu(g: Any, u: Any) -> Any:
        return swiglu_quantise(g, u, Quantiser(), implementation=TPU)

    def transposed(x: Any) -> Any:
        return requantise_transposed(
            quantise(x, Quantiser(), implementation="reference"), Quantiser(tile=(128, 1)), implementation=TPU
        )

    rows, wide = _array(ROWS, HIDDEN), _array(ROWS, WIDTH)
    return [
        *(Case(f"quantise_{m}x{k}", "quantise", f"{ROWS}x{HIDDEN}", partial(tiles, (m, k)), (rows,))
          for m, k in ((1, 128), (128, 1), (128, 128))),
        Case("quantise_swiglu", "swiglu_quantise", f"{ROWS}x{WIDTH}", swiglu, (wide, wide)),
        Case("requantise_transposed", "requantise_transposed", f"{ROWS}x{HIDDEN}", transposed, (rows,)),
    ]  # fmt: skip
