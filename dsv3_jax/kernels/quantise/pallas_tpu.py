"""Quantisation on TPU: one pass over the input, in blocks of whole tiles.

Within a block a loop goes over pieces [height, 128] that are whole tiles, held in registers between amax, scale and cast.
Mosaic has the casts between float32 and both formats on every chip from v5e on, so that values are rounded by it, to nearest,
ties to even: by one instruction on tpu7x, and for e5m2 everywhere; by some ten for e4m3 on v5e, v5p and v6e. A tile's largest
value becomes the format's largest, within float32's rounding, so that the cast need not saturate; that is why delayed scales,
of earlier steps, are not for this kernel.

What lies beyond an operand's edge is undefined: tiles that reach there select what is theirs before amax.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.fp8.formats import Format
from dsv3_jax.fp8.quantize import Quantiser, scale_of
from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.quantise.call import SIDE, cast, magnitudes
from dsv3_jax.kernels.tiles import MIB, PACKED, aligned, up
from dsv3_jax.kernels.traffic import Operand, moved


class Blocks(NamedTuple):
    """Rows and columns in VMEM, multiples of SIDE; pieces of a block that are scheduled together."""

    rows: int
    columns: int
    unroll: int = 2
    vmem_mib: int = 48


# By tile. Where tiles are SIDE wide, a block's scales are as many lanes as its columns are tiles: all, or a multiple of 128.
BLOCKS = {
    (1, SIDE): Blocks(128, 128 * SIDE, unroll=8),
    (SIDE, 1): Blocks(512, 2048),
    (SIDE, SIDE): Blocks(128, 128 * SIDE),
}
TRANSPOSED = Blocks(512, 1024)

Load = Callable[[Sequence[Any], Any, Any, Any], jax.Array]  # operands, rows, columns, tile's column -> piece in float32


class Plan(NamedTuple):
    grid: tuple[int, int, int]  # matrices, blocks of rows, blocks of columns
    blocks: Blocks
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, Operand]  # values, scales
    transposed: bool


def _plan(inputs: Sequence[Any], n_wide: int, how: Quantiser, scale_bits: bool, transposed: bool = False) -> Plan:
    """`inputs` [S, M, .] or what has their shapes and dtypes: `n_wide` ones as wide as the first, the others one block wide."""
    stack, rows, columns = inputs[0].shape
    tall, wide = (side == SIDE for side in how.tile)
    blocks = TRANSPOSED if transposed else BLOCKS[how.tile]
    blocks = blocks._replace(rows=min(blocks.rows, up(rows, SIDE)), columns=min(blocks.columns, up(columns, SIDE)))
    grid = stack, pl.cdiv(rows, blocks.rows), pl.cdiv(columns, blocks.columns)
    whole = (1, blocks.rows, blocks.columns)
    sources = [Operand(v.shape, jnp.dtype(v.dtype), whole, lambda s, i, j: (s, i, j)) for v in inputs[:n_wide]]
    for v in inputs[n_wide:]:
        sources.append(Operand(v.shape, jnp.dtype(v.dtype), (1, blocks.rows, v.shape[2]), lambda s, i, j: (s, i, 0)))

    kind = jnp.dtype(how.form.dtype)
    values = Operand((stack, rows, columns), kind, whole, lambda s, i, j: (s, i, j))
    if transposed:
        values = Operand((stack, columns, rows), kind, (1, blocks.columns, blocks.rows), lambda s, i, j: (s, j, i))
    kind = jnp.dtype(jnp.uint8 if scale_bits else jnp.float32)
    across, block = (pl.cdiv(columns, SIDE), blocks.columns // SIDE) if wide else (columns, blocks.columns)
    block = min(block, across) if wide else block
    scale = Operand((stack, rows, across), kind, (1, blocks.rows, block), lambda s, i, j: (s, i, j))
    if tall:  # [S, tiles, 1, .]: a block of few rows of scales is then whole in its last sides but one
        shape, block_shape = (stack, pl.cdiv(rows, SIDE), 1, across), (1, blocks.rows // SIDE, 1, block)
        scale = Operand(shape, kind, block_shape, lambda s, i, j: (s, i, 0, j))
    return Plan(grid, blocks, tuple(sources), (values, scale), transposed)


def bytes_moved(
    inputs: Sequence[Any], how: Quantiser, *, n_wide: int = 1, scale_bits: bool = False, transposed: bool = False
) -> int:
    """Between memory and chip in one call, from its grid.

    `inputs`: what the kernel reads, [matrices, rows, .] each, or something with their shapes and dtypes; the first `n_wide` are
    as wide as the values. `transposed`: what `requantise_transposed` does, its scales' transposition by XLA included.
    """
    plan = _plan(inputs, n_wide, how, scale_bits, transposed)
    return moved(plan.grid, [*plan.inputs, *plan.outputs]) + (2 * plan.outputs[1].bytes if transposed else 0)


def quantise(x_SMK: jax.Array, how: Quantiser, *, scale_bits: bool, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """As `call.Quantise`."""

    def load(refs: Sequence[Any], rows: Any, columns: Any, tile: Any) -> jax.Array:
        return refs[0][rows, columns].astype(jnp.float32)

    return _run(_plan([x_SMK], 1, how, scale_bits), [x_SMK], load, how, "quantise", interpret)


def swiglu_quantise(
    g_RF: jax.Array, u_RF: jax.Array, gates_R: jax.Array | None, how: Quantiser, *, scale_bits: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """As `call.SwigluQuantise`."""

    def load(refs: Sequence[Any], rows: Any, columns: Any, tile: Any) -> jax.Array:
        g, u = (ref[rows, columns].astype(jnp.float32) for ref in refs[:2])
        a = jax.nn.silu(g) * u
        return a if gates_R is None else a * refs[2][rows, :]

    inputs = [g_RF[None], u_RF[None], *([] if gates_R is None else [gates_R[None, :, None]])]
    values, scale = _run(_plan(inputs, 2, how, scale_bits), inputs, load, how, "swiglu_quantise", interpret)
    return values[0], scale[0]


def requantise_transposed(
    values_RI: jax.Array, scale: jax.Array, form: Format, how: Quantiser, *, scale_bits: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """As `call.Requantise`."""

    def load(refs: Sequence[Any], rows: Any, columns: Any, tile: Any) -> jax.Array:
        scales = refs[1][rows, :]
        lane = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
        # Of a lane that is known at run time only: a sum, from which the others are left out.
        return refs[0][rows, columns].astype(jnp.float32) * jnp.where(lane == tile, scales, 0.0).sum(axis=1, keepdims=True)

    inputs = [values_RI[None], scale[None]]
    plan = _plan(inputs, 1, how, scale_bits, transposed=True)
    values, scales = _run(plan, inputs, load, how, "requantise_transposed", interpret)
    return values[0], scales[0].T


def _run(
    plan: Plan, inputs: Sequence[Any], load: Load, how: Quantiser, name: str, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Pieces as `load` gives them, quantised: values as `plan` has them, scales [S, tiles, tiles]."""
    (_, rows, columns), blocks = inputs[0].shape, plan.blocks
    tall, wide = (side == SIDE for side in how.tile)
    height, across = SIDE if tall else PACKED, blocks.columns // SIDE
    axes = tuple(axis for axis, whole in enumerate((tall, wide)) if whole)

    def kernel(*refs: Any) -> None:
        sources, (values, scale) = refs[: len(inputs)], refs[len(inputs) :]
        i, j = pl.program_id(1), pl.program_id(2)

        def piece(r: Any, c: Any) -> jax.Array:
            """Quantises it, and gives its scales."""
            rows_at, columns_at = aligned(r, height), aligned(c, SIDE)
            x = load(sources, rows_at, columns_at, j * across + c)
            if tall and rows % SIDE:
                x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) + (i * blocks.rows + r * height) < rows, x, 0.0)
            if wide and columns % SIDE:
                x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) + (j * blocks.columns + c * SIDE) < columns, x, 0.0)
            scales = scale_of(magnitudes(x).max(axis=axes, keepdims=True), how)
            y = x / scales
            if plan.transposed:
                values[columns_at, rows_at] = cast(y.T, how.form)
            else:
                values[rows_at, columns_at] = cast(y, how.form)
            return _bits(scales) if scale.dtype == jnp.uint8 else scales

        def strip(r: Any, _: None) -> None:
            at = r if tall else aligned(r, height)

            def collect(c: Any, found: jax.Array) -> jax.Array:
                return jnp.where(lax.broadcasted_iota(jnp.int32, found.shape, 1) == c, piece(r, c), found)

            def store(c: Any, _: None) -> None:
                scale[at, :, aligned(c, SIDE)] = piece(r, c).astype(scale.dtype)

            unroll = min(blocks.unroll, across)
            if not wide:
                return lax.fori_loop(0, across, store, None, unroll=unroll)
            kind = jnp.int32 if scale.dtype == jnp.uint8 else jnp.float32
            zeros = jnp.zeros((1 if tall else height, scale.shape[-1]), kind)
            scale[at] = lax.fori_loop(0, across, collect, zeros, unroll=unroll).astype(scale.dtype)

        lax.fori_loop(0, blocks.rows // height, strip, None)

    values, scale = pl.pallas_call(
        kernel,
        out_shape=[result(out.shape, out.dtype, inputs[0], interpret) for out in plan.outputs],
        grid=plan.grid,
        in_specs=[_spec(operand) for operand in plan.inputs],
        out_specs=[_spec(out) for out in plan.outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=blocks.vmem_mib * MIB
        ),
        name=name,
        interpret=interpret,
    )(*inputs)
    return values, scale.reshape(scale.shape[0], scale.shape[1], scale.shape[-1])


def _spec(operand: Operand) -> pl.BlockSpec:
    return pl.BlockSpec((None, *operand.block[1:]), operand.at)


def _bits(scales: jax.Array) -> jax.Array:
    """Exponents of powers of two: UE8M0, in int32."""
    return lax.bitcast_convert_type(scales, jnp.int32) >> 23 & 255
