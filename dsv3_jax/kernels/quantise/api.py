"""Quantisation to tiles and blocks in one pass over the input: amax, scale, cast [§3.3.2].

    quantise(x, how)                      as `fp8.quantize.quantise`, to the bit, in the format's own dtype
    requantise_transposed(x, how)         quantise(x's numbers, in tiles along its rows).T: for Wgrad
    swiglu_quantise(g, u, how, gates_R)   quantise(silu(g) * u * gates): the wide product is never written

Scales are the same to the bit, and values that are rounded from the same quotient. But of a tile of several rows a compiler may
make x / s to x * (1 / s), which where that is a tie gives the value's neighbour.

They are for the inside of an operation that has its own gradient: nothing flows back through them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.bits import from_bits
from dsv3_jax.fp8.quantize import Quantised, Quantiser
from dsv3_jax.kernels.modes import mode_of
from dsv3_jax.kernels.quantise import pallas_gpu, pallas_tpu, reference
from dsv3_jax.kernels.quantise.call import SIDE, TILES, Quantise, Requantise, SwigluQuantise


class Implementation(NamedTuple):
    quantise: Quantise
    requantise_transposed: Requantise
    swiglu_quantise: SwigluQuantise


IMPLEMENTATIONS = {
    "reference": Implementation(reference.quantise, reference.requantise_transposed, reference.swiglu_quantise),
    "pallas_tpu": Implementation(pallas_tpu.quantise, pallas_tpu.requantise_transposed, pallas_tpu.swiglu_quantise),
    "pallas_gpu": Implementation(pallas_gpu.quantise, pallas_gpu.requantise_transposed, pallas_gpu.swiglu_quantise),
}


def quantise(x: Float[Array, "*stack M K"], how: Quantiser, *, scale_bits: bool = False, implementation: str) -> Quantised:
    """x, float32 or bfloat16, rounded: values [*stack, M, K] in the format's dtype, scales [*stack, tiles, tiles] in float32.

    `scale_bits`: scales, powers of two, as bytes (UE8M0). Tiles are 1 x 128, 128 x 1 or 128 x 128, formats have 8 bits.
    `implementation`: one of IMPLEMENTATIONS; see `kernels.modes`. Raises ValueError for what is none of these.
    """
    mode = mode_of(implementation, tuple(IMPLEMENTATIONS))
    _check(how, TILES, scale_bits, x=x)
    m, k = x.shape[-2:]
    flat = lax.stop_gradient(x).reshape(math.prod(x.shape[:-2]), m, k)
    name = "reference" if flat.size == 0 else mode.implementation
    run = IMPLEMENTATIONS[name].quantise
    values, scale = run(flat, how, scale_bits=scale_bits, interpret=mode.interpret)
    return Quantised(
        values.reshape(x.shape), scale.reshape(*x.shape[:-2], *scale.shape[1:]), (m, k), how.tile, how.form
    )  # fmt: skip


def requantise_transposed(x: Quantised, how: Quantiser, *, scale_bits: bool = False, implementation: str) -> Quantised:
    """The same as `quantise(x.astype(float32), how).T`, for x [R, I] in 1 x 128 tiles and `how` in 128 x 1.

    x's values are in its format's dtype or as bytes, its scales float32 or bytes; the result [I, R] is in 1 x 128 tiles.
    `scale_bits`, `implementation` and errors: as in `quantise`.
    """
    mode = mode_of(implementation, tuple(IMPLEMENTATIONS))
    _check(how, [(SIDE, 1)], scale_bits)
    if x.tile != (1, SIDE) or x.form.bits != 8 or x.values.dtype.itemsize != 1 or x.values.ndim != 2:
        raise ValueError(f"x: expected a matrix of one byte a value in 1 x {SIDE} tiles, got {x.dtype} {x.shape} in {x.tile}")
    values = lax.stop_gradient(from_bits(x.values, jnp.dtype(x.form.dtype)))
    scale = lax.stop_gradient(x.scale)
    if scale.dtype == jnp.uint8:
        scale = lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)
    name = "reference" if values.size == 0 else mode.implementation
    run = IMPLEMENTATIONS[name].requantise_transposed
    values, scale = run(values, scale, x.form, how, scale_bits=scale_bits, interpret=mode.interpret)
    return Quantised(values, scale, values.shape, (1, SIDE), how.form)


def swiglu_quantise(
    g_RF: Float[Array, "R F"],
    u_RF: Float[Array, "R F"],
    how: Quantiser,
    gates_R: Float[Array, " R"] | None = None,
    *,
    scale_bits: bool = False,
    implementation: str,
) -> Quantised:
    """silu(g) * u, times the row's gate (float32) if there are any, in float32 and rounded in 1 x 128 tiles: [R, F].

    g and u are float32 or bfloat16, alike. `scale_bits`, `implementation` and errors: as in `quantise`.
    """
    mode = mode_of(implementation, tuple(IMPLEMENTATIONS))
    _check(how, [(1, SIDE)], scale_bits, g_RF=g_RF, u_RF=u_RF)
    if g_RF.shape != u_RF.shape or g_RF.dtype != u_RF.dtype:
        raise ValueError(f"u_RF: expected g's shape and dtype, {g_RF.dtype} {g_RF.shape}, got {u_RF.dtype} {u_RF.shape}")
    if gates_R is not None and (gates_R.shape != g_RF.shape[:1] or gates_R.dtype != jnp.float32):
        raise ValueError(f"gates_R: expected float32 {g_RF.shape[:1]}, got {gates_R.dtype} {gates_R.shape}")
    operands = lax.stop_gradient((g_RF, u_RF, gates_R))
    name = "reference" if g_RF.size == 0 else mode.implementation
    run = IMPLEMENTATIONS[name].swiglu_quantise
    values, scale = run(*operands, how, scale_bits=scale_bits, interpret=mode.interpret)
    return Quantised(values, scale, g_RF.shape, how.tile, how.form)


def _check(how: Quantiser, tiles: Sequence[Any], scale_bits: bool, **operands: Any) -> None:
    if how.tile not in tiles:
        raise ValueError(f"how: expected tiles {' or '.join(f'{m} x {k}' for m, k in tiles)}, got {how.tile}")
    if how.form.bits != 8:
        raise ValueError(f"how: expected a format of 8 bits, e4m3 or e5m2, got {how.form.name}; `fp8.quantize` has others")
    if scale_bits and not how.power_of_two:
        raise ValueError("scale_bits: expected scales that are powers of two, got others; set how.power_of_two")
    for name, operand in operands.items():
        if operand.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name}: expected float32 or bfloat16, got {operand.dtype}; cast it")
