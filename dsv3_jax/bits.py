"""Narrow floats as integers of the same bits: what moves, where XLA on CPU would convert."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def to_bits(array: Array) -> Array:
    """Narrow floats as integers of the same bits; any other dtype as it is. `from_bits` is the way back.

    To gather, slice or update bfloat16, XLA on CPU converts the *whole* array to float32 and back. Integers it just moves.
    """
    return from_bits(array, bits_dtype(array.dtype))


def bits_dtype(dtype: Any) -> Any:
    """That of `to_bits`."""
    if dtype.itemsize > 2 or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return jnp.dtype(jnp.uint16 if dtype.itemsize == 2 else jnp.uint8)


def from_bits(array: Array, dtype: Any) -> Array:
    """The array of `dtype` whose `to_bits` is this."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)
