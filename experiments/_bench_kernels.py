"""The kernels that `bench_kernels` compiles, at DeepSeek-V3's shapes: what they are called with, and how often their loops run.

Peers are kernels that ship with JAX, and tokamax's where it is installed, for the same operands, in the best of a few block
sizes: all of the contraction at once, where products have no branches that a count of bundles would have to weigh.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from dsv3_jax.fp8.quantize import Quantised, Quantiser
from dsv3_jax.kernels.attention import pallas_tpu as attention_forward
from dsv3_jax.kernels.attention import pallas_tpu_backward as attention_backward
from dsv3_jax.kernels.decode import pallas_tpu as decode_tpu
from dsv3_jax.kernels.decode import plan as decode_plan
from dsv3_jax.kernels.decode.api import decode_attention, paged_decode_attention
from dsv3_jax.kernels.grouped import blocks_tpu, outer_tpu, pallas_tpu
from dsv3_jax.kernels.grouped.api import grouped_swiglu
from dsv3_jax.kernels.grouped.call import Out
from dsv3_jax.kernels.grouped.cost import Cost, entries_of, of_outer, of_products
from dsv3_jax.kernels.quantise import pallas_tpu as quantise_tpu
from dsv3_jax.kernels.quantise.api import quantise, requantise_transposed, swiglu_quantise
from dsv3_jax.kernels.quantise.call import SIDE
from dsv3_jax.kernels.router import pallas_tpu as router_tpu
from dsv3_jax.kernels.router.api import choose
from dsv3_jax.kernels.scaled import pallas_tpu as scaled_tpu
from dsv3_jax.kernels.scaled.api import grouped_scaled_outer, grouped_scaled_product, scaled_product
from dsv3_jax.kernels.tiles import LANES, PACKED
from dsv3_jax.presets import preset
from experiments import _bench_attention, _bench_scaled, _bench_tokamax
from experiments._bench_case import BF16, Case
from experiments._bench_case import array as _array

HIDDEN, WIDTH = 7168, 2048
COUNTS = (4301, 3688, 4535, 3902, 4120, 3577, 4646, 3999)  # rows of 8 experts of one rank: the choices of 4,096 tokens
TILED = 4224, 3712, 4480, 3968, 4096, 3584, 4608, 4096  # about as many, in whole tiles of 128
ROWS, EXPERTS = sum(COUNTS), len(COUNTS)
GMM = (512, 512), (512, 256), (256, 512), (1024, 256)  # rows, columns
TGMM = (512, 1024, 1024), (512, 512, 1024), (512, 1024, 512), (1024, 512, 512)


def cases(kind: str) -> list[Case]:
    """For this kind of device, ours and then its peers."""
    found = [
        *_product("grouped_up", kind, HIDDEN, WIDTH, transposed=False),
        *_product("grouped_down", kind, WIDTH, HIDDEN, transposed=False),
        *_product("grouped_up_transposed", kind, WIDTH, HIDDEN, transposed=True),
        *_product("grouped_down_transposed", kind, HIDDEN, WIDTH, transposed=True),
        *_swiglu(kind),
        *_outer(kind),
        *_attention(kind, 4096),
        *_attention(kind, 32768),
        *_decode(kind, 4096),
        *_decode(kind, 32768),
        _router(),
        *quantisers(TPU),
        *scaled(TPU, kind),
    ]
    return found


TPU = "pallas_tpu"
GROUPS = _array(EXPERTS, dtype=jnp.int32)


def _product(name: str, kind: str, inner: int, outer: int, *, transposed: bool) -> list[Case]:
    blocks = blocks_tpu.blocks_of(kind, 1, transposed, inner, 1)
    ours = of_products(COUNTS, ROWS, inner, outer, blocks, weights=1, wide_extras=0, outs=1, transposed=transposed)
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
        found.append(Case(name, "gmm", shape, partial(peer, tiles), operands, theirs, tiles, "gmm"))
    return [*found, *_bench_tokamax.products(name, shape, operands, COUNTS, ours, transposed=transposed)]


def _swiglu(kind: str) -> list[Case]:
    weight, down, shape = _array(EXPERTS, HIDDEN, WIDTH), _array(EXPERTS, WIDTH, HIDDEN), f"{ROWS}x{HIDDEN}x2x{WIDTH}"
    operands = (_array(ROWS, HIDDEN), _array(ROWS, dtype=jnp.float32), weight, weight, down, GROUPS)

    def run(*operands: Any) -> Any:
        return grouped_swiglu(*operands, implementation=TPU)

    def back(*operands: Any) -> Any:
        *floats, count = operands
        return jax.vjp(lambda *floats: run(*floats, count), *floats)[1](floats[0])[1]  # the gates': no other kernels

    def case(name: str, run: Any, wide: int, **how: Any) -> Case:
        blocks = blocks_tpu.blocks_of(kind, how["weights"], how["transposed"], HIDDEN, wide)
        cost = of_products(COUNTS, ROWS, HIDDEN, WIDTH, blocks, **how)
        return Case(name, name, shape, run, operands, cost, blocks, copies=True)

    return [
        case("grouped_swiglu", run, 3, weights=2, transposed=False, wide_extras=0, outs=3),
        # Beside three gradients an output of one column, that of the gates.
        case("grouped_swiglu_backward", back, 6, weights=1, transposed=True, wide_extras=2, outs=3),
    ]


def _outer(kind: str) -> list[Case]:
    blocks = blocks_tpu.outer_blocks_of(kind)
    ours = of_outer(COUNTS, ROWS, HIDDEN, WIDTH, blocks)
    shape, operands = f"{HIDDEN}x{ROWS}x{WIDTH}", (_array(ROWS, HIDDEN), _array(ROWS, WIDTH), GROUPS)

    def run(x: Any, y: Any, count: Any) -> Any:
        return outer_tpu.outer_products(x, y, count, dtype=BF16, name="grouped_outer", interpret=False, blocks=blocks)

    def peer(tiles: tuple[int, int, int], x: Any, y: Any, count: Any) -> Any:
        return tgmm(x.T, y, count, BF16, tiles)

    found = [Case("grouped_outer", "grouped_outer", shape, run, operands, ours, blocks)]
    for tiles in TGMM:
        entries = len(entries_of(COUNTS, tiles[0]))
        steps = -(-HIDDEN // tiles[1]) * -(-WIDTH // tiles[2]) * entries
        ends = EXPERTS / entries  # a group's first step, and its last one
        theirs = ours._replace(steps=steps, trips=(ends, 1, ends), flops=2 * steps * tiles[0] * tiles[1] * tiles[2])
        run_of = partial(peer, tiles)
        found.append(Case("grouped_outer", "tgmm", shape, run_of, operands, theirs, tiles, "tgmm", parts=True))
    return [*found, *_bench_tokamax.outer_products("grouped_outer", shape, operands, COUNTS, ours)]


def _attention(kind: str, length: int) -> list[Case]:
    forward, backward = (module.BLOCKS_OF_CHIP.get(kind, module.BLOCKS) for module in (attention_forward, attention_backward))
    shape, operands = f"128x{length}x(128+64,128)", _bench_attention.arrays(length)
    found = [
        Case("attention", "mla_attention", shape, partial(_bench_attention.ours, TPU), operands,
             _bench_attention.forward_cost(length, forward), forward, parts=True),
        Case("attention_backward", "mla_attention_backward", shape, partial(_bench_attention.ours_backward, TPU), operands,
             _bench_attention.backward_cost(length, backward), backward, parts=True, small=(1, 8), copies=True),
    ]  # fmt: skip
    for name, program, table, of_pair in (
        ("attention", "splash_mha_fwd_residuals", _bench_attention.SPLASH, _bench_attention.FORWARD),
        ("attention_backward", "splash_mha_dkv_no_residuals", _bench_attention.SPLASH_BACKWARD, _bench_attention.BACKWARD),
    ):
        back = name == "attention_backward"
        for blocks in table:
            cost = _bench_attention.splash_cost(length, blocks, of_pair, keys_outside=back)

            def run(*operands: Any, blocks: tuple[int, ...] = blocks, back: bool = back) -> Any:
                return _bench_attention.splash(length, blocks, backward=back)(*operands)

            arrays = _bench_attention.splash_arrays(length)
            found.append(Case(name, program, shape, run, arrays, cost, blocks, program, parts=True))
    for blocks in _bench_attention.FLASH:
        run, cost = _bench_attention.flash(blocks), _bench_attention.flash_cost(length, blocks)
        arrays = _bench_attention.splash_arrays(length)
        found.append(Case("attention", "flash_attention", shape, run, arrays, cost, blocks, "flash_attention", parts=True))
    return [*found, *_bench_tokamax.attention(length, shape)]


def _decode(kind: str, length: int) -> list[Case]:
    """Sequences of all lengths up to `length`, of pages of 64 rows or of one."""
    batch, heads, width, page = 32, 128, 640, 64  # a row of 576 lies in 640 lanes
    lengths = tuple(length * (i + 1) // batch - i for i in range(batch))
    q, counts = _array(batch, 1, heads, 576), _array(batch, dtype=jnp.int32)
    pages, table = _array(batch * length // page, page, width), _array(batch, length // page, dtype=jnp.int32)
    blocks = decode_tpu.BLOCKS_OF_CHIP.get(kind, decode_tpu.BLOCKS)

    def contiguous(q: Any, cache: Any, lengths: Any) -> Any:
        return decode_attention(q, cache, lengths, latent=512, scale=0.1, implementation=TPU)

    def paged(q: Any, cache: Any, table: Any, lengths: Any) -> Any:
        return paged_decode_attention(q, cache, table, lengths, latent=512, scale=0.1, implementation=TPU)

    def cost(page: int) -> Cost:
        problem = decode_plan.Problem(lengths, 1, heads, 576, 512, page, length // page)
        least, performed = decode_plan.least(problem), decode_plan.performed(problem, blocks)
        return Cost(*decode_plan.trips(problem, blocks), performed.bytes, least.bytes, performed.flops, least.flops)

    shape, cache = f"{batch}x{heads}x{length}", _array(batch, length, width)
    how: dict[str, Any] = dict(blocks=blocks, parts=True, small=(2 * (blocks.depth - 1) + 6,))  # that is a part's start
    return [
        Case("decode", "decode", shape, contiguous, (q, cache, counts), cost(length), **how),
        Case("decode_paged", "decode_paged", shape, paged, (q, pages, table, counts), cost(page), **how),
    ]


def _router() -> Case:
    config, experts = preset("deepseek_v3_671b").model, 256

    def run(logits: Any, bias: Any) -> Any:
        return choose(logits, bias, config, implementation=TPU)

    operands = (_array(ROWS, experts, dtype=jnp.float32), _array(experts, dtype=jnp.float32))
    tokens, k = router_tpu.BLOCKS.tokens, config.num_experts_per_tok
    least = 4 * (2 * ROWS * experts + experts + ROWS * (2 * k + 1))
    moved = router_tpu.bytes_moved(ROWS, experts, k)
    width = router_tpu.WIDTH if tokens % router_tpu.WIDTH == 0 else LANES
    each = tokens / width  # turns, within each of which loops are over rows, groups and rounds
    trips = (each, each * width / router_tpu.HEIGHT, each * (config.n_group or 1), each * (k + 1))
    cost = Cost(-(-ROWS // tokens), trips, moved, least, 0, 0)
    return Case("router", "router", f"{ROWS}x{experts}", run, operands, cost, router_tpu.BLOCKS, parts=True)


def _quantise_cost(inputs: list[Any], tile: tuple[int, int], n_wide: int = 1, *, transposed: bool = False) -> Cost:
    """Of a grid of blocks: where there are several strips of rows a loop over them, within it one over tiles' columns."""
    _, rows, columns = inputs[0].shape
    table = quantise_tpu.TRANSPOSED if transposed else quantise_tpu.BLOCKS[tile]
    tall, wide = min(table.rows, -(-rows // SIDE) * SIDE), min(table.columns, -(-columns // SIDE) * SIDE)
    steps = -(-rows // tall) * -(-columns // wide)
    strips, across = tall // (SIDE if tile[0] == SIDE else PACKED), wide // SIDE
    turns = across // min(table.unroll, across)
    trips = [float(strips)] * (strips > 1) + [float(strips * turns)] * (turns > 1)
    moved = quantise_tpu.bytes_moved(inputs, Quantiser(tile=tile), n_wide=n_wide, transposed=transposed)
    scales = -(-rows // tile[0]) * -(-columns // tile[1]) * 4
    least = sum(v.size * v.dtype.itemsize for v in inputs) + rows * columns + scales
    return Cost(steps, tuple(trips), moved, least, 0, 0)


def quantisers(implementation: str) -> list[Case]:
    def tiles(tile: tuple[int, int], x: Any) -> Any:
        return quantise(x, Quantiser(tile=tile), implementation=implementation)

    def swiglu(g: Any, u: Any) -> Any:
        return swiglu_quantise(g, u, Quantiser(), implementation=implementation)

    def transposed(x: Any) -> Any:
        return requantise_transposed(
            quantise(x, Quantiser(), implementation="reference"), Quantiser(tile=(SIDE, 1)), implementation=implementation
        )

    rows, wide = _array(ROWS, HIDDEN), _array(ROWS, WIDTH)
    stacked, halves = [_array(1, ROWS, HIDDEN)], [_array(1, ROWS, WIDTH)] * 2
    narrow = [_array(1, ROWS, HIDDEN, dtype=jnp.float8_e4m3fn), _array(1, ROWS, HIDDEN // SIDE, dtype=jnp.float32)]
    kinds = (1, SIDE), (SIDE, 1), (SIDE, SIDE)
    return [
        *(Case(f"quantise_{m}x{k}", "quantise", f"{ROWS}x{HIDDEN}", partial(tiles, (m, k)), (rows,),
               _quantise_cost(stacked, (m, k)), quantise_tpu.BLOCKS[m, k], parts=True, copies=m > k) for m, k in kinds),
        Case("quantise_swiglu", "swiglu_quantise", f"{ROWS}x{WIDTH}", swiglu, (wide, wide),
             _quantise_cost(halves, (1, SIDE), 2), quantise_tpu.BLOCKS[1, SIDE], parts=True),
        Case("requantise_transposed", "requantise_transposed", f"{ROWS}x{HIDDEN}", transposed, (rows,),
             _quantise_cost(narrow, (SIDE, 1), transposed=True), quantise_tpu.TRANSPOSED, parts=True),
    ]  # fmt: skip


def scaled(implementation: str, kind: str = "") -> list[Case]:
    """FP8 products; the gradient of weights with rows in whole tiles. Costs are those of a TPU of this kind, if it is given."""
    how: dict[str, Any] = {"dtype": BF16, "implementation": implementation}

    def operand(*shape: int, tile: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        tiles = [-(-size // side) for size, side in zip(shape[-2:], tile, strict=True)]
        return _array(*shape, dtype=jnp.float8_e4m3fn), _array(*shape[:-2], *tiles, dtype=jnp.float32)

    def quantised(values: Any, scale: Any, tile: tuple[int, int]) -> Quantised:
        return Quantised(values, scale, values.shape[-2:], tile)

    def up(a: Any, a_scale: Any, b: Any, b_scale: Any, count: Any, transposed: bool = False) -> Any:
        a, b = quantised(a, a_scale, (1, SIDE)), quantised(b, b_scale, (SIDE, SIDE))
        return grouped_scaled_product(a, b, count, transposed=transposed, **how)

    def outer(x: Any, x_scale: Any, y: Any, y_scale: Any, count: Any) -> Any:
        return grouped_scaled_outer(quantised(x, x_scale, (1, SIDE)), quantised(y, y_scale, (SIDE, 1)), count, **how)

    def plain(a: Any, a_scale: Any, b: Any, b_scale: Any) -> Any:
        return scaled_product(quantised(a, a_scale, (1, SIDE)), quantised(b, b_scale, (SIDE, SIDE)), **how)

    row, block = (1, SIDE), (SIDE, SIDE)
    wide, narrow = operand(ROWS, HIDDEN, tile=row), operand(ROWS, WIDTH, tile=row)
    weights, dense = operand(EXPERTS, HIDDEN, WIDTH, tile=block), operand(HIDDEN, 18432, tile=block)
    along = *operand(HIDDEN, ROWS, tile=row), *operand(ROWS, WIDTH, tile=(SIDE, 1))
    name, tokens = "grouped_scaled_product", operand(4096, HIDDEN, tile=row)
    table, of_outer = scaled_tpu.blocks_of(kind)
    fp8, dense_counts, big = kind in scaled_tpu.FP8, (4096,), 18432
    costs = [None] * 4 if not kind else [
        _bench_scaled.product_cost(COUNTS, ROWS, HIDDEN, WIDTH, table, transposed=False, fp8=fp8),
        _bench_scaled.product_cost(COUNTS, ROWS, WIDTH, HIDDEN, table, transposed=True, fp8=fp8),
        _bench_scaled.outer_cost(TILED, ROWS, HIDDEN, WIDTH, of_outer, fp8=fp8),
        _bench_scaled.product_cost(dense_counts, 4096, HIDDEN, big, table, transposed=False, fp8=fp8),
    ]  # fmt: skip
    case: dict[str, Any] = dict(parts=True, small=(0,))
    return [
        Case("fp8_up", name, f"{ROWS}x{HIDDEN}x{WIDTH}", up, (*wide, *weights, GROUPS), costs[0], table, **case),
        Case("fp8_up_transposed", f"{name}_transposed", f"{ROWS}x{WIDTH}x{HIDDEN}", partial(up, transposed=True),
             (*narrow, *weights, GROUPS), costs[1], table, **case),
        Case("fp8_outer", "grouped_scaled_outer", f"{HIDDEN}x{ROWS}x{WIDTH}", outer, (*along, GROUPS), costs[2], of_outer,
             parts=True),
        Case("fp8_dense", "scaled_product", f"4096x{HIDDEN}x{big}", plain, (*tokens, *dense), costs[3], table, **case),
    ]  # fmt: skip
