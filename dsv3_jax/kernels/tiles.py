"""What the kernels have in common: the hardware's tiles, blocks and padding to them, a block's product, what XLA is told."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128  # of a TPU's vector register
SUBLANES, SUBLANES_BF16, PACKED = 8, 16, 32  # its rows of float32, of bfloat16, and of bytes
MIB = 2**20


def up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def fitted(size: int, block: int, step: int, whole: int) -> tuple[int, int]:
    """Block and step within it, no larger than a side of `size`; one that is less than a step is a multiple of `whole`."""
    if size <= step:
        return up(size, whole), up(size, whole)
    return min(block, up(size, step)), step


def aligned(i: Any, size: int) -> Any:
    """The i-th piece of `size`, which on TPU must be known to begin at a multiple of it."""
    return pl.ds(pl.multiple_of(i * size, size), size)


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


def estimate(flops: int, *arrays: Any) -> pl.CostEstimate:
    """For XLA's schedule, and for whoever adds up a program's FLOPs; each array is moved once."""
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
