"""How a matrix may be stored: as it is, or in few bits with scales beside them [§3.3; serving, §3.4].

A stored weight stands wherever an array of the parameter tree does: `astype(dtype)` gives the array. Its parts' leading axes are
the array's own (layers, experts), so that a scan, or an expert's number, selects from all of them alike. The matrix itself is
held with two sides, (in, out), and `sides` says what shape it really has.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

FP8_BLOCK = 128  # rows and columns that share one scale in released checkpoints


def to_bits(array: Array) -> Array:
    """Narrow floats as integers of the same bits; any other dtype as it is. `from_bits` is the way back.

    To gather, slice or update bfloat16, XLA on CPU converts the *whole* array to float32 and back. Integers it just moves.
    """
    size = array.dtype.itemsize
    if size > 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return lax.bitcast_convert_type(array, jnp.uint16 if size == 2 else jnp.uint8)


def from_bits(array: Array, dtype: Any) -> Array:
    """The array of `dtype` whose `to_bits` is this."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockScaled:
    """FP8, one float32 scale for each block of 128 x 128; blocks at the edges are smaller. value * scale is the weight."""

    values: Array  # [*stack, in, out], float8_e4m3fn
    scale: Array  # [*stack, ceil(in / 128), ceil(out / 128)]: float32, or float8_e8m0fnu as stored
    sides: tuple[int, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], *self.sides)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def astype(self, dtype: Any) -> Array:
        """The weights, a product in float32, rounded once to `dtype`."""
        n_in, n_out = self.values.shape[-2:]
        scale = self.scale.astype(jnp.float32)
        scale = jnp.repeat(jnp.repeat(scale, FP8_BLOCK, axis=-2)[..., :n_in, :], FP8_BLOCK, axis=-1)[..., :n_out]
        return (self.values.astype(jnp.float32) * scale).astype(dtype).reshape(self.shape)


Stored = (BlockScaled,)


def is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)


def selected(weight: Any, index: Array) -> Any:
    """weight[index] along the first axis, for an index that is only known while running; the rest is not touched."""

    def select(part: Array) -> Array:
        return from_bits(lax.dynamic_index_in_dim(to_bits(part), index, keepdims=False), part.dtype)

    return jax.tree.map(select, weight)


def n_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, scales included."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))
