"""Quantisation on GPU, through Triton: a program holds one piece of whole tiles in registers between amax, scale and cast.

Loads and stores are masked at the edges. A tile's largest value becomes the format's largest, within float32's rounding, so
that the cast need not saturate.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dsv3_jax.fp8.formats import Format
from dsv3_jax.fp8.quantize import Quantiser, scale_of
from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.quantise.call import SIDE, cast, magnitudes


class Blocks(NamedTuple):
    """Rows and columns of a program, powers of two: SIDE where the tile is, or less where it is 1."""

    rows: int
    columns: int
    warps: int


BLOCKS = {(1, SIDE): Blocks(32, SIDE, 4), (SIDE, 1): Blocks(SIDE, 64, 4), (SIDE, SIDE): Blocks(SIDE, SIDE, 4)}

Load = Callable[[Sequence[jax.Array]], jax.Array]  # pieces in float32, [rows, columns] or [rows, 1] -> the piece to quantise


def quantise(x_SMK: jax.Array, how: Quantiser, *, scale_bits: bool, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """As `call.Quantise`."""
    return _run([x_SMK], 1, lambda pieces: pieces[0], how, scale_bits, "quantise", interpret)


def swiglu_quantise(
    g_RF: jax.Array, u_RF: jax.Array, gates_R: jax.Array | None, how: Quantiser, *, scale_bits: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """As `call.SwigluQuantise`."""

    def load(pieces: Sequence[jax.Array]) -> jax.Array:
        g, u, *gates = pieces
        a = jax.nn.silu(g) * u
        return a * gates[0] if gates else a

    inputs = [g_RF[None], u_RF[None], *([] if gates_R is None else [gates_R[None, :, None]])]
    values, scale = _run(inputs, 2, load, how, scale_bits, "swiglu_quantise", interpret)
    return values[0], scale[0]


def requantise_transposed(
    values_RI: jax.Array, scale: jax.Array, form: Format, how: Quantiser, *, scale_bits: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """As `call.Requantise`."""

    def load(pieces: Sequence[jax.Array]) -> jax.Array:
        return pieces[0] * pieces[1]

    inputs = [values_RI[None], scale[None]]
    values, scales = _run(inputs, 1, load, how, scale_bits, "requantise_transposed", interpret, transposed=True)
    return values[0], scales[0]


def _run(
    inputs: Sequence[Any],
    n_wide: int,
    load: Load,
    how: Quantiser,
    scale_bits: bool,
    name: str,
    interpret: Any,
    transposed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`n_wide` inputs are as wide as the values; the others have one column for all of them, or one for each SIDE."""
    (stack, rows, columns), blocks = inputs[0].shape, BLOCKS[how.tile]
    tall, wide = (side == SIDE for side in how.tile)
    axes = tuple(axis for axis, whole in enumerate((tall, wide)) if whole)

    def kernel(*refs: Any) -> None:
        sources, (values, scale) = refs[: len(inputs)], refs[len(inputs) :]
        s, i, j = (pl.program_id(axis) for axis in range(3))
        row, column = (n * side + jnp.arange(side, dtype=jnp.int32) for n, side in ((i, blocks.rows), (j, blocks.columns)))
        at = pl.ds(i * blocks.rows, blocks.rows), pl.ds(j * blocks.columns, blocks.columns)
        within = (row < rows)[:, None] & (column < columns)[None, :]
        whole = [
            plgpu.load(v.at[s, *at], mask=within, other=jnp.zeros((), v.dtype)).astype(jnp.float32) for v in sources[:n_wide]
        ]
        for v in sources[n_wide:]:
            n = lax.min(lax.div(j * blocks.columns, SIDE), v.shape[2] - 1)
            whole.append(plgpu.load(v.at[s, at[0], n], mask=row < rows, other=0).astype(jnp.float32)[:, None])
        x = load(whole)
        amax = magnitudes(x)
        for axis in reversed(axes):
            amax = amax.max(axis=axis)
        scales = scale_of(amax, how)
        y = cast(x / jnp.expand_dims(scales, axes), how.form)
        if scale_bits:
            scales = (lax.bitcast_convert_type(scales, jnp.int32) >> 23 & 255).astype(jnp.uint8)
        place: tuple[Any, Any] = (i if tall else at[0]), (j if wide else at[1])
        mask = None if tall and wide else row < rows if wide else column < columns
        if transposed:
            at, place, y, within = at[::-1], place[::-1], y.T, within.T
        plgpu.store(values.at[s, *at], y, mask=within)
        plgpu.store(scale.at[s, *place], scales, mask=mask)

    shape, tiles = (rows, columns), (pl.cdiv(rows, how.tile[0]), pl.cdiv(columns, how.tile[1]))
    if transposed:
        shape, tiles = shape[::-1], tiles[::-1]
    return pl.pallas_call(
        kernel,
        out_shape=[
            result((stack, *shape), how.form.dtype, inputs[0], interpret),
            result((stack, *tiles), jnp.uint8 if scale_bits else jnp.float32, inputs[0], interpret),
        ],
        grid=(stack, pl.cdiv(rows, blocks.rows), pl.cdiv(columns, blocks.columns)),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps),
        name=name,
        interpret=interpret,
    )(*inputs)
