"""How a matrix may be stored: as it is, or in few bits with scales beside them [§3.3; serving, §3.4].

A stored weight stands wherever an array of the parameter tree does: `astype(dtype)` gives the array. Its parts' leading axes
are the array's own (layers, experts), so that a scan, or an expert's number, selects from all of them alike. The matrix itself
is held with two sides, (in, out); where it has more, `sides` says which.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dsv3_jax.bits import bits_dtype, from_bits
from dsv3_jax.fp8.quantize import Quantised


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits:
    """Narrow floats as integers of the same bits, turned back where they are used."""

    values: Array
    kind: Any = field(metadata={"static": True})  # dtype of the floats

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return self.kind

    def astype(self, dtype: Any) -> Array:
        return from_bits(self.values, self.kind).astype(dtype)


def bits_on_cpu(array: Array) -> Any:
    """An array of CPU memory as `Bits` of the same memory, if its floats are narrow: as a program's argument it is not copied.

    `to_bits` within a program copies an argument whole.
    """
    kind = bits_dtype(array.dtype)
    if kind == array.dtype or next(iter(array.devices())).platform != "cpu":
        return array
    return Bits(jax.device_put(np.asarray(array).view(kind)), array.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """Eight bits, one scale for each output channel; for weights that only serve. value * scale is the weight."""

    values: Array  # [*stack, in, out], or [rows, in] of a table; int8, -127..127
    scale: Array  # the same, of 1 along `axis`; float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def astype(self, dtype: Any) -> Array:
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4:
    """Four bits, one scale for each group of inputs of an output channel; two values a byte, neighbours among the inputs."""

    pairs: Array  # as `values`, but half as long along `axis`, uint8: the earlier value in the low half; a value v is v + 8
    scale: Array  # as long along `axis` as there are groups, float32
    axis: int = field(metadata={"static": True})  # of the inputs: -2, or -1 in a table
    size: int = field(metadata={"static": True})  # number of inputs
    group: int = field(metadata={"static": True})  # inputs that share a scale

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pairs.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.pairs.ndim

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.int4)

    def astype(self, dtype: Any) -> Array:
        axis = self.pairs.ndim + self.axis
        values = jnp.stack([self.pairs & 15, self.pairs >> 4], axis=axis + 1).astype(jnp.float32) - 8
        values = values.reshape(*self.pairs.shape[:axis], -1, *self.pairs.shape[axis + 1 :])
        values = lax.slice_in_dim(values, 0, self.size, axis=axis)
        scale = lax.slice_in_dim(jnp.repeat(self.scale, self.group, axis=axis), 0, self.size, axis=axis)
        return (values * scale).astype(dtype)


Stored = (Bits, Quantised, Int8, Int4)


def to_int8(weight: Array, axis: int = -2) -> Int8:
    """Rounded to the nearest of 255 values between minus and plus the channel's largest magnitude; `axis` of the inputs."""
    weight = weight.astype(jnp.float32)
    scale = _scale_of(jnp.abs(weight).max(axis=axis, keepdims=True), 127)
    return Int8(jnp.round(weight / scale).astype(jnp.int8), scale)


def to_int4(weight: Array, axis: int = -2, group: int = 64) -> Int4:
    """Rounded to the nearest of 15 values between minus and plus the group's largest magnitude."""
    weight, place = weight.astype(jnp.float32), weight.ndim + axis
    size = weight.shape[place]
    group = min(group, size)
    padding = [(0, 0)] * weight.ndim
    padding[place] = (0, -size % math.lcm(group, 2))
    padded = jnp.pad(weight, padding)
    shape = (*weight.shape[:place], -1, group, *weight.shape[place + 1 :])
    scale = _scale_of(jnp.abs(padded.reshape(shape)).max(axis=place + 1), 7)
    values = jnp.round(padded / jnp.repeat(scale, group, axis=place)).astype(jnp.int8) + 8
    early, late = (lax.slice_in_dim(values, first, None, stride=2, axis=place).astype(jnp.uint8) for first in (0, 1))
    return Int4(early | (late << 4), scale, axis, size, group)


def _scale_of(largest: Array, steps: int) -> Array:
    """1 where everything is 0."""
    return jnp.where(largest > 0, largest, float(steps)) / steps


def is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)


def n_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, scales included."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))
