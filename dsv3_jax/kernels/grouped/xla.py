"""The grouped products as XLA has them: `jax.lax.ragged_dot`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.grouped.call import Epilogue, Out
from dsv3_jax.kernels.tiles import precision_of

# [R, I] x [E, O, I]: the contraction is over the last axis of both.
_TRANSPOSED = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_OUTER = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


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
    precision, kind = precision_of(x_RI), jnp.float32

    def product(w: jax.Array) -> jax.Array:
        if transposed:
            return lax.ragged_dot_general(x_RI, w, count_E, _TRANSPOSED, precision=precision, preferred_element_type=kind)
        return lax.ragged_dot(x_RI, w, count_E, precision=precision, preferred_element_type=kind)

    values = epilogue([product(w) for w in weights], [v.astype(jnp.float32) for v in extras])
    own_R1 = (jnp.arange(x_RI.shape[0], dtype=jnp.int32) < count_E.sum(dtype=jnp.int32))[:, None]
    return tuple(jnp.where(own_R1, v, 0.0).astype(out.dtype) for v, out in zip(values, outs, strict=True))


def outer_products(x_RI: jax.Array, y_RO: jax.Array, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any) -> jax.Array:
    """As `call.OuterProducts`."""
    precision = precision_of(x_RI)
    own_R1 = (jnp.arange(x_RI.shape[0], dtype=jnp.int32) < count_E.sum(dtype=jnp.int32))[:, None]
    x_RI, y_RO = (jnp.where(own_R1, v, jnp.zeros((), v.dtype)) for v in (x_RI, y_RO))
    sums = lax.ragged_dot_general(x_RI, y_RO, count_E, _OUTER, precision=precision, preferred_element_type=jnp.float32)
    return sums.astype(dtype)
