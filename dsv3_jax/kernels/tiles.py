"""What the kernels' bodies have in common: the hardware's tiles, padding to blocks, and the matrix product of a block."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128  # of a TPU's vector register
MIB = 2**20


def up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def padded(x: jax.Array, step: int, axis: int = -2) -> jax.Array:
    """By zeros, to a multiple of `step`."""
    extra = [(0, 0)] * x.ndim
    extra[axis] = (0, -x.shape[axis] % step)
    return jnp.pad(x, extra) if extra[axis][1] else x


def precision_of(x: jax.Array) -> Any:
    """float32 is multiplied as such, also where products of it are made of less by default."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def dot(a: jax.Array, b: jax.Array, a_axis: int = 1, b_axis: int = 0) -> jax.Array:
    """Of two blocks over these axes, in float32."""
    numbers = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision_of(a), preferred_element_type=jnp.float32)
