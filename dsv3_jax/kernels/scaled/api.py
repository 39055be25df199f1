"""Products of FP8 operands with a scale for each tile [§3.3.2]: Fprop, Dgrad and Wgrad, plain and grouped.

    y = scaled_product(a, b)                            y_mn = sum over tiles t of K of a_scale_mt b_scale_tn sum_k a_mk b_kn
    y = scaled_product_transposed(a, b)                 the same with b's transpose, b as it is stored
    y = grouped_scaled_product(a, b, count)             y_r = a_r B_group(r)
    w = grouped_scaled_outer(x, y, count)               w_e = sum over the rows of group e, x y

The 128 products of a tile are added up in float32, then scaled, and these are added up in float32 again: what the report's
promotion every 128 products is for. Rows are sorted by group, `count_E` of each, and may be of none, as in `kernels.grouped`.
They are for the inside of an operation that has its own gradient: nothing flows back through them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.bits import from_bits
from dsv3_jax.fp8.quantize import Quantised
from dsv3_jax.kernels.modes import Mode, mode_of
from dsv3_jax.kernels.scaled import pallas_gpu, pallas_tpu, reference
from dsv3_jax.kernels.scaled.call import SIDE, OuterProducts, Products, Tiled
from dsv3_jax.kernels.tiles import padded


class Implementation(NamedTuple):
    products: Products
    outer_products: OuterProducts


IMPLEMENTATIONS = {
    "reference": Implementation(reference.products, reference.outer_products),
    "pallas_tpu": Implementation(pallas_tpu.products, pallas_tpu.outer_products),
    "pallas_gpu": Implementation(pallas_gpu.products, pallas_gpu.outer_products),
}
ROW, COLUMN, BLOCK = (1, SIDE), (SIDE, 1), (SIDE, SIDE)


def scaled_product(a: Quantised, b: Quantised, *, dtype: Any, implementation: str) -> Float[Array, "M N"]:
    """a [M, K] in 1 x 128 tiles times b [K, N] in 128 x 128 tiles (weights) or 128 x 1 (Wgrad), in float32 or bfloat16.

    Values are of formats with 8 bits, e4m3 or e5m2, each operand its own, in that dtype or as bytes; scales float32 or UE8M0's
    bytes. `implementation`: one of IMPLEMENTATIONS; see `kernels.modes`.
    Raises ValueError for another one, and for other tiles, formats and dtypes, and sides that do not fit.
    """
    mode = _mode(implementation, dtype)
    _check("a", a, 2, ROW)
    _check("b", b, 2, BLOCK, COLUMN)
    rows, inner = a.values.shape
    if b.values.shape[0] != inner:
        raise ValueError(f"b: expected [{inner}, N] for a {[rows, inner]}, got {list(b.values.shape)}")
    if b.tile == BLOCK:
        return _products(a, _stack(b), jnp.full(1, rows, jnp.int32), False, dtype, "scaled_product", mode)
    return _outer(a, b, jnp.full(1, inner + -inner % SIDE, jnp.int32), dtype, "scaled_product", mode)[0]


def scaled_product_transposed(a: Quantised, b: Quantised, *, dtype: Any, implementation: str) -> Float[Array, "M N"]:
    """a [M, K] in 1 x 128 tiles times the transpose of b [N, K] in 128 x 128 tiles, which is not copied: Dgrad.

    Formats, dtypes, `implementation` and errors: as in `scaled_product`.
    """
    mode = _mode(implementation, dtype)
    _check("a", a, 2, ROW)
    _check("b", b, 2, BLOCK)
    rows, inner = a.values.shape
    if b.values.shape[1] != inner:
        raise ValueError(f"b: expected [N, {inner}] for a {[rows, inner]}, got {list(b.values.shape)}")
    return _products(a, _stack(b), jnp.full(1, rows, jnp.int32), True, dtype, "scaled_product_transposed", mode)


def grouped_scaled_product(
    a: Quantised, b: Quantised, count_E: Int[Array, " E"], *, transposed: bool = False, dtype: Any, implementation: str
) -> Float[Array, "R N"]:
    """Each row of a [R, K], in 1 x 128 tiles, times its group's matrix of b [E, K, N], or `transposed` [E, N, K], 128 x 128.

    Rows behind the last group's become zeros. Formats, dtypes, `implementation` and errors: as in `scaled_product`.
    """
    mode = _mode(implementation, dtype)
    _check("a", a, 2, ROW)
    _check("b", b, 3, BLOCK)
    inner, n_groups = a.values.shape[1], count_E.shape[0]
    if b.values.shape[0] != n_groups or b.values.shape[2 if transposed else 1] != inner:
        sides = f"N, {inner}" if transposed else f"{inner}, N"
        raise ValueError(f"b: expected [{n_groups}, {sides}], got {list(b.values.shape)}")
    name = "grouped_scaled_product_transposed" if transposed else "grouped_scaled_product"
    return _products(a, b, count_E.astype(jnp.int32), transposed, dtype, name, mode)


def grouped_scaled_outer(
    x: Quantised, y: Quantised, count_E: Int[Array, " E"], *, dtype: Any, implementation: str
) -> Float[Array, "E I O"]:
    """For each group the sum over its rows of x [I, R], in 1 x 128 tiles, times y [R, O], in 128 x 1 tiles: Wgrad.

    Every count is a multiple of 128, so that no tile is of two groups; groups without a row give zeros.
    Formats, dtypes, `implementation` and errors: as in `scaled_product`.
    """
    mode = _mode(implementation, dtype)
    _check("x", x, 2, ROW)
    _check("y", y, 2, COLUMN)
    if y.values.shape[0] != x.values.shape[1]:
        raise ValueError(f"y: expected [{x.values.shape[1]}, O] for x {list(x.values.shape)}, got {list(y.values.shape)}")
    return _outer(x, y, count_E.astype(jnp.int32), dtype, "grouped_scaled_outer", mode)


def _mode(implementation: str, dtype: Any) -> Mode:
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype: expected float32 or bfloat16 for sums in float32, got {dtype}")
    return mode_of(implementation, tuple(IMPLEMENTATIONS))


def _check(name: str, matrix: Quantised, ndim: int, *tiles: tuple[int, int]) -> None:
    values, scale = matrix.values, matrix.scale
    if matrix.tile not in tiles:
        wanted = " or ".join(f"{m} x {k}" for m, k in tiles)
        raise ValueError(f"{name}: expected tiles {wanted}, got {matrix.tile}; quantise it in these")
    if matrix.form.bits != 8:
        raise ValueError(
            f"{name}: expected a format of 8 bits, e4m3 or e5m2, got {matrix.form.name}; `fp8.accumulate` has others"
        )
    if values.dtype not in (matrix.form.dtype, jnp.uint8):
        raise ValueError(f"{name}: expected values in {matrix.form.name}'s dtype or as bytes, got {values.dtype}; use packed()")
    if values.ndim != ndim:
        raise ValueError(f"{name}: expected values of {ndim} axes, got {list(values.shape)}")
    if scale.dtype not in (jnp.float32, jnp.uint8):
        raise ValueError(f"{name}: expected scales in float32 or UE8M0's bytes, got {scale.dtype}")
    sides = [-(-size // side) for size, side in zip(values.shape[-2:], matrix.tile, strict=True)]
    if scale.shape != (*values.shape[:-2], *sides):
        raise ValueError(f"{name}: expected scales {[*values.shape[:-2], *sides]} for its tiles, got {list(scale.shape)}")


def _stack(b: Quantised) -> Quantised:
    """As the only matrix of a stack."""
    return Quantised(b.values[None], b.scale[None], b.sides, b.tile, b.form)


def _tiled(matrix: Quantised, axis: int) -> Tiled:
    """Values in the format's dtype, of whole tiles along `axis`, and scales in float32."""
    values, scale = from_bits(matrix.values, jnp.dtype(matrix.form.dtype)), matrix.scale
    if scale.dtype == jnp.uint8:
        scale = lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)
    return Tiled(padded(lax.stop_gradient(values), SIDE, axis), lax.stop_gradient(scale))


def _products(a: Quantised, b: Quantised, count_E: Array, transposed: bool, dtype: Any, name: str, mode: Mode) -> Array:
    (rows, inner), outer = a.values.shape, b.values.shape[1 if transposed else 2]
    operands = _tiled(a, -1), _tiled(b, -1 if transposed else -2)
    if 0 in (rows, inner, outer):
        return jnp.zeros((rows, outer), dtype)
    run = IMPLEMENTATIONS[mode.implementation].products
    return run(*operands, count_E, transposed=transposed, dtype=dtype, name=name, interpret=mode.interpret)


def _outer(x: Quantised, y: Quantised, count_E: Array, dtype: Any, name: str, mode: Mode) -> Array:
    (inner, rows), outer = x.values.shape, y.values.shape[1]
    operands = _tiled(x, -1), _tiled(y, -2)
    if 0 in (rows, inner, outer):
        return jnp.zeros((count_E.shape[0], inner, outer), dtype)
    run = IMPLEMENTATIONS[mode.implementation].outer_products
    return run(*operands, count_E, dtype=dtype, name=name, interpret=mode.interpret)
