"""Attention's grids for `bench_kernels`, ours for TPU and those that ship with JAX: steps, trips, bytes and FLOPs.

Useful FLOPs are counted here for all: half the square, and of a backward pass five products, the scores' among them.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from dsv3_jax.kernels.attention import pallas_tpu, pallas_tpu_backward
from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.kernels.attention.step_tpu import Step
from dsv3_jax.kernels.grouped.cost import Cost
from dsv3_jax.kernels.traffic import Operand, moved

HEADS, CONTENT, ROPE, VALUE = 128, 128, 64, 128
KEY = CONTENT + ROPE
FORWARD, BACKWARD = 2 * (KEY + VALUE), 2 * (3 * KEY + 2 * VALUE)  # FLOPs of a query and a key that it sees
SPLASH = (1024, 1024, 512), (1024, 1024, 1024), (2048, 2048, 512)  # queries, keys, keys of one iteration
SPLASH_BACKWARD = (1024, 1024, 512), (1024, 1024, 1024), (1024, 2048, 512), (1024, 2048, 1024)

FLASH = (1024, 1024, 512), (1024, 1024, 1024)
FLASH_WIDTH = 256  # one for queries, keys and values, in whole tiles

SPLASH_HEADS = 16  # to compile: a step has one, and of 128 the queries' gradients, once a block of keys, fit no memory

REAL, WIDE = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def least_flops(length: int, of_pair: int, heads: int = HEADS) -> int:
    """Of the queries with the keys at or before them."""
    return heads * (length * (length + 1) // 2) * of_pair


def _visible(first: int, height: int, tile: int, tiles: int) -> tuple[int, int]:
    """Tiles that all of `height` queries see whole, and those that some see of; the first query sees `first` + 1 keys."""
    return min(max(first + 1, 0) // tile, tiles), min(max(first + height + tile - 1, 0) // tile, tiles)


def _trips(step: Step, firsts: Sequence[int]) -> tuple[list[int], int]:
    """Of all steps together, of scores [queries, keys]: trips of whole tiles, of those on the diagonal; FLOPs."""
    height, tile, tiles = step.height, step.tile, step.keys // step.tile
    tops = range(0, step.queries, height)
    runs, pairs = [0] * (1 + len(tops)), 0
    for first in firsts:
        whole, _ = _visible(first, step.queries, tile, tiles)
        extra = [_visible(first + top, height, tile, tiles)[1] - whole for top in tops]
        runs = [a + b for a, b in zip(runs, [whole, *extra], strict=True)]
        pairs += whole * step.queries * tile + sum(extra) * height * tile
    return runs, pairs * FORWARD


def _turned_trips(step: Step, firsts: Sequence[int]) -> tuple[list[int], int]:
    """As `_trips`, of scores [keys, queries]: first ones, pieces, whole tiles, those of each copy, and so on the diagonal."""
    height, tile, tiles = step.height, step.tile, step.keys // step.tile
    begun = pieces = 0
    whole, diagonal = [0, 0], [0, 0]
    for first in firsts:
        seen = [top for top in range(0, step.queries, height) if first + top + height > 0]
        begun, pieces, slot = begun + bool(seen), pieces + len(seen), 0
        for top in seen:
            of_all, of_some = _visible(first + top, height, tile, tiles)
            for t in range(of_some):
                (whole if t < of_all else diagonal)[slot] += 1
                slot = 1 - slot
    stops = [min(left + step.columns, height) for left in range(0, height, step.columns)]
    widths = [stop - left for left, stop in zip([0, *stops], stops, strict=False)]
    of_diagonal = sum(n * (stop if height == tile else tile) for n, stop in zip(widths, stops, strict=True))
    values = sum(whole) * height * tile + sum(diagonal) * of_diagonal
    scores = (begun + sum(whole) + sum(diagonal)) * height * tile  # a step's last are nobody's
    starts = [] if len(firsts) == 1 else [begun]
    return [*starts, pieces, sum(whole), *whole, sum(diagonal), *diagonal], 2 * (scores * KEY + values * VALUE)


def forward_cost(length: int, blocks: pallas_tpu.Blocks, heads: int = HEADS) -> Cost:
    """Of `pallas_tpu.forward` with as many queries as keys. `trips`: of start, whole tiles, those on the diagonal, finish."""
    step = pallas_tpu.step_of(blocks, length, length, VALUE, 1.0)
    block, block_s = step.queries, step.keys
    n_t, n_s = -(-length // block), -(-length // block_s)
    steps = n_t * n_s
    ends = [] if n_s == 1 else [1 / n_s]  # else they are part of every step
    counted = _turned_trips if blocks.part else _trips
    firsts = [i * block - j * block_s for i in range(n_t) for j in range(n_s)]
    runs, flops = counted(step, firsts)
    trips = (*ends, *(n / steps for n in runs), *ends)

    def last(i: int, j: int) -> int:
        return min(j, (min((i + 1) * block, length) - 1) // block_s)

    def of_query(h: int, i: int, j: int) -> tuple[int, int, int]:
        return h, i, 0

    def of_key(h: int, i: int, j: int) -> tuple[int, int, int]:
        return h, last(i, j), 0

    operands = [
        *(Operand((heads, length, width), REAL, (1, block, width), of_query) for width in (CONTENT, ROPE, VALUE)),
        *(Operand((heads, length, width), REAL, (1, block_s, width), of_key) for width in (CONTENT, VALUE)),
        Operand((length, ROPE), REAL, (block_s, ROPE), lambda h, i, j: (last(i, j), 0)),
        Operand((heads, length), WIDE, (1, block), lambda h, i, j: (h, i)),
    ]
    return Cost(
        heads * steps, trips, moved((heads, n_t, n_s), operands), sum(x.bytes for x in operands),
        heads * flops, least_flops(length, FORWARD, heads),
    )  # fmt: skip


def backward_cost(length: int, blocks: pallas_tpu_backward.Blocks, heads: int = HEADS) -> Cost:
    """Of `pallas_tpu_backward.backward` with as many queries as keys, of several blocks, within one span.

    `trips`: of starts (keys, rotary keys, queries), tiles of keys, of queries with them where scores are masked and where not,
    finishes (queries, keys, rotary keys). Those of rotary keys are small.
    """
    tile = min(blocks.tile, length)
    block = min(blocks.block, -(-length // tile) * tile)
    n, tiles, cores = -(-length // block), block // tile, 2 - heads % 2
    each = heads // cores
    if n == 1 or length > blocks.span:
        raise ValueError(f"backward: expected several blocks of {block} in a span of {blocks.span}, got {length}")
    together = blocks.wide // tile if block % blocks.wide == 0 else 1
    steps = pallas_tpu_backward.walk(n, n, block, 0).tolist()
    masked = whole = 0
    for j, i in zip(steps[0], steps[1], strict=True):
        for keys in range(tiles):
            behind = (j - i) * block + keys * tile
            first, all_of_it = (min(max(n, 0) // tile, tiles) for n in (behind, behind + 2 * tile - 2))
            all_of_it = -(-all_of_it // together)
            masked, whole = masked + all_of_it * together - first, whole + tiles // together - all_of_it
    count = len(steps[0])
    ends = n / count, n / count, n / count / each
    trips = (ends[0], ends[2], ends[1], tiles, masked / count, whole / count, *ends)

    def of_query(c: int, h: int, s: int) -> tuple[int, int, int]:
        return c * each + h, steps[1][s], 0

    def along(c: int, h: int, s: int) -> tuple[int, int]:
        return c * each + h, steps[1][s]

    def of_key(c: int, h: int, s: int) -> tuple[int, int, int]:
        return c * each + h, steps[0][s], 0

    def complete(c: int, h: int, s: int) -> tuple[int, int, int]:
        return c * each + h, steps[3][s], 0

    shapes = {width: (heads, length, width) for width in (CONTENT, ROPE, VALUE)}
    inputs = [
        *(Operand(shapes[width], REAL, (1, block, width), of_query) for width in (CONTENT, ROPE, VALUE)),
        *(Operand(shapes[width], REAL, (1, block, width), of_key) for width in (CONTENT, VALUE)),
        Operand((length, ROPE), REAL, (block, ROPE), lambda c, h, s: (steps[0][s], 0)),
        *[Operand((heads, length), WIDE, (1, block), along)] * 2,
    ]
    outputs = [
        *(Operand(shapes[width], REAL, (1, block, width), complete) for width in (CONTENT, ROPE)),
        *(Operand(shapes[width], REAL, (1, block, width), of_key) for width in (CONTENT, VALUE)),
        Operand((cores, ROPE, length), WIDE, (1, ROPE, block), lambda c, h, s: (c, 0, steps[0][s] if h == each - 1 else 0)),
    ]
    least = sum(x.bytes for x in [*inputs, *outputs[:4]]) + length * ROPE * REAL.itemsize
    return Cost(
        heads * count, trips, moved((cores, each, count), [*inputs, *outputs]), least,
        heads * (masked + whole * together) * tile * tile * BACKWARD, least_flops(length, BACKWARD, heads),
    )  # fmt: skip


def splash_cost(length: int, blocks: Sequence[int], of_pair: int, *, keys_outside: bool, heads: int = HEADS) -> Cost:
    """Of the kernels that ship with JAX: a grid of heads and all blocks, of which those below the diagonal do nothing.

    `trips`: of start, of a block's products, of finish. `keys_outside`: the walk is over queries. Bytes are not counted.
    """
    block_q, block_kv, _ = blocks
    n_q, n_kv = -(-length // block_q), -(-length // block_kv)
    runs = sum(j * block_kv <= i * block_q + block_q - 1 for i in range(n_q) for j in range(n_kv))
    end = 1 / (n_q if keys_outside else n_kv)
    return Cost(
        heads * n_q * n_kv, (end, runs / (n_q * n_kv), end), 0, 0, heads * runs * block_q * block_kv * of_pair,
        least_flops(length, of_pair, heads),
    )  # fmt: skip


def arrays(length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Ours: content and rotary parts of queries and of keys, values."""
    heads, rope = ((1, HEADS, length, width) for width in (CONTENT, ROPE))
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (heads, rope, heads, (1, length, ROPE), heads))


def ours(implementation: str, q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any) -> Any:
    return mla_attention(q, q_rope, k, k_rope, v, None, KEY**-0.5, implementation=implementation)


def ours_backward(implementation: str, *operands: Any) -> Any:
    return jax.vjp(partial(ours, implementation), *operands)[1](operands[4])


def splash(length: int, blocks: Sequence[int], *, backward: bool) -> Any:
    """The function of q [H, T, 192], k and v [H, T, 128] that has JAX's splash attention in it.

    With queries, and forward also keys, transposed, whose 192 then take no 256 lanes; to transpose them is not counted.
    """
    q, kv, compute = blocks
    of_q, of_kv = (512, 512) if backward else (q, kv)
    along, across = splash_attention_kernel.QKVLayout.HEAD_DIM_MINOR, splash_attention_kernel.QKVLayout.SEQ_MINOR
    sizes = splash_attention_kernel.BlockSizes(
        block_q=of_q, block_kv=of_kv, block_kv_compute=min(of_kv, compute),
        q_layout=across, k_layout=along if backward else across,
    )  # fmt: skip
    if backward:
        sizes = dataclasses.replace(
            sizes, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True
        )  # fmt: skip
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * SPLASH_HEADS),
        head_shards=1, q_seq_shards=1, save_residuals=not backward,
        block_sizes=sizes,
    )  # fmt: skip
    return (lambda q, k, v: jax.vjp(kernel, q, k, v)[1](v)) if backward else kernel


def splash_arrays(length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((SPLASH_HEADS, length, width), jnp.bfloat16) for width in (KEY, KEY, VALUE))


def flash_cost(length: int, blocks: Sequence[int]) -> Cost:
    """Its grid and branches are those of `splash_cost`, forward; its products are wider."""
    cost = splash_cost(length, blocks, FORWARD, keys_outside=False)
    return cost._replace(flops=cost.flops // FORWARD * 4 * FLASH_WIDTH)


def flash(blocks: Sequence[int]) -> Any:
    """The function of q [H, T, 192], k and v [H, T, 128] that has JAX's flash attention in it, forward."""
    queries, keys, compute = blocks
    sizes = flash_attention.BlockSizes(queries, keys, compute, block_b=1)

    def run(*operands: Any) -> Any:
        wide = (jnp.pad(x, ((0, 0), (0, 0), (0, FLASH_WIDTH - x.shape[-1])))[None] for x in operands)
        return flash_attention.flash_attention(*wide, causal=True, sm_scale=KEY**-0.5, block_sizes=sizes)

    return run
