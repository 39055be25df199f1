"""The scaled products in plain JAX: tile after tile of the contraction, every group's matrix times every row."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.scaled.call import SIDE, Tiled


def products(a: Tiled, b: Tiled, count_E: jax.Array, *, transposed: bool, dtype: Any, name: str, interpret: Any) -> jax.Array:
    """As `call.Products`."""
    (x_RI, x_scale), (w, w_scale) = a, b
    if transposed:
        w, w_scale = w.swapaxes(1, 2), w_scale.swapaxes(1, 2)
    (rows, inner), outer = x_RI.shape, w.shape[2]
    end_E1 = jnp.cumsum(count_E, dtype=jnp.int32)[:, None]
    row_1R = jnp.arange(rows, dtype=jnp.int32)[None, :]
    own_ER1 = ((row_1R >= end_E1 - count_E[:, None]) & (row_1R < end_E1))[:, :, None]

    def add(total_RO: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        a, b = lax.dynamic_slice_in_dim(x_RI, t * SIDE, SIDE, 1), lax.dynamic_slice_in_dim(w, t * SIDE, SIDE, 1)
        y_ERO = jnp.einsum("ri,eio->ero", *_wide(a, b), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        b_scale = jnp.repeat(w_scale[:, t], SIDE, axis=-1)[:, None, :outer]
        y_ERO = y_ERO * (x_scale[:, t][None, :, None] * b_scale)
        return total_RO + jnp.where(own_ER1, y_ERO, 0.0).sum(axis=0), None

    zeros_RO = jnp.zeros_like(x_RI, jnp.float32, shape=(rows, outer))
    return lax.scan(add, zeros_RO, jnp.arange(inner // SIDE, dtype=jnp.int32))[0].astype(dtype)


def outer_products(a: Tiled, b: Tiled, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any) -> jax.Array:
    """As `call.OuterProducts`."""
    (x_IR, x_scale), (y_RO, y_scale) = a, b
    (inner, rows), outer = x_IR.shape, y_RO.shape[1]
    end_E = jnp.cumsum(count_E, dtype=jnp.int32)

    def add(total_EIO: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        a, b = lax.dynamic_slice_in_dim(x_IR, t * SIDE, SIDE, 1), lax.dynamic_slice_in_dim(y_RO, t * SIDE, SIDE, 0)
        sum_IO = jnp.matmul(*_wide(a, b), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        sum_IO = sum_IO * x_scale[:, t][:, None] * y_scale[t][None, :]
        own_E11 = ((t * SIDE >= end_E - count_E) & (t * SIDE < end_E))[:, None, None]
        return total_EIO + jnp.where(own_E11, sum_IO[None], 0.0), None

    zeros_EIO = jnp.zeros_like(x_IR, jnp.float32, shape=(count_E.shape[0], inner, outer))
    return lax.scan(add, zeros_EIO, jnp.arange(rows // SIDE, dtype=jnp.int32))[0].astype(dtype)


def _wide(*matrices: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(matrix.astype(jnp.float32) for matrix in matrices)
