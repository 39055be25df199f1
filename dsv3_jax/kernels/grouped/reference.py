"""The grouped products in plain JAX: every group's matrix times every row, and what is not the group's left out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.grouped.call import Epilogue, Out


def _own(count_E: jax.Array, rows: int) -> jax.Array:
    """Whether a row is of a group: [E, R, 1]."""
    end_E1 = jnp.cumsum(count_E, dtype=jnp.int32)[:, None]
    row_1R = jnp.arange(rows, dtype=jnp.int32)[None, :]
    return ((row_1R >= end_E1 - count_E[:, None]) & (row_1R < end_E1))[:, :, None]


def products(
    x_RI: jax.Array,
    weights: Sequence[jax.Array],
    extras: Sequence[jax.Array],
    count_E: jax.Array,
    outs: Sequence[Out],
    epilogue: Epilogue,
    *,
    transposed: bool,
    name: str,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """As `call.Products`."""
    own_ER1 = _own(count_E, x_RI.shape[0])

    def product(w: jax.Array) -> jax.Array:
        spec = "ri,eoi->ero" if transposed else "ri,eio->ero"
        y_ERO = jnp.einsum(spec, x_RI, w, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        return jnp.where(own_ER1, y_ERO, 0.0).sum(axis=0)

    values = epilogue([product(w) for w in weights], [v.astype(jnp.float32) for v in extras])
    return tuple(jnp.where(own_ER1.any(axis=0), v, 0.0).astype(out.dtype) for v, out in zip(values, outs, strict=True))


def outer_products(x_RI: jax.Array, y_RO: jax.Array, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any) -> jax.Array:
    """As `call.OuterProducts`."""

    def one(own_R1: jax.Array) -> jax.Array:
        x, y = (jnp.where(own_R1, v, jnp.zeros((), v.dtype)) for v in (x_RI, y_RO))
        return jnp.einsum("ri,ro->io", x, y, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    return jax.vmap(one)(_own(count_E, x_RI.shape[0])).astype(dtype)
