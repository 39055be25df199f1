"""Products of quantised operands and three fidelities of accumulation [§3.3.2, figure 7b].

* `float32`: the dequantised operands' product in float32. What an ideal machine would give, up to float32's rounding.
* `promoted`: as the tensor core accumulates, but every `interval` products the sum moves to a float32 register, and is scaled
  on the way: the report's N_C = 128.
* `tensor_core`: as the tensor core accumulates, over all of K.

The tensor core takes 32 products at a time, shifts them to the largest exponent among them and keeps 14 bits of each, cut off.
Two readings of what the report leaves open: does the accumulator join them (`aligned`: it too is shifted and cut, and so keeps
14 bits), or is their sum added to it in float32 (`apart`)? A measurement decided for `aligned`: this model equals FP8 products
on an H200 (cuBLASLt, E4M3, K from 32 to 4,096) bit for bit, `tensor_core` with fast accumulation and `promoted` without it. It
showed details besides: a product's exponent is the sum of its operands', where subnormal numbers have the format's least, and
the new sum is cut to 14 bits as well. `apart` stays, to ask what it would have cost.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.fp8.quantize import Quantised

GROUP = 32  # products that the tensor core aligns together
KEPT_BITS = 14

Fidelity = Literal["float32", "promoted", "tensor_core"]
Reading = Literal["aligned", "apart"]


@dataclass(frozen=True)
class Accumulation:
    """How products are added up. `interval`: products between two promotions."""

    fidelity: Fidelity = "float32"
    reading: Reading = "aligned"
    interval: int = 128

    @property
    def carries(self) -> bool:
        """Whether the register of one product goes on into the next of the same sum."""
        return self.fidelity == "tensor_core"

    def __str__(self) -> str:
        if self.fidelity == "float32":
            return "float32"
        bits = f"{KEPT_BITS} bits {self.reading}"
        return f"{bits}, f32/{self.interval}" if self.fidelity == "promoted" else bits


def product(a: Quantised, b: Quantised, how: Accumulation, start: Float[Array, "M N"] | None = None) -> Float[Array, "M N"]:
    """a [M, K] times b [K, N], float32; added to `start`, the sum so far, where it is given.

    Raises ValueError if the operands' tiles along K differ and the products are not in float32.
    """
    if how.fidelity == "float32":
        total = jnp.matmul(
            a.astype(jnp.float32), b.astype(jnp.float32), precision="highest", preferred_element_type=jnp.float32
        )
        return total if start is None else start + total
    a, b = a.wide(), b.wide()
    (m, k), n = a.values.shape, b.values.shape[1]
    side, other = (min(tile or k, k) for tile in (a.tile[1], b.tile[0]))
    if side != other:
        raise ValueError(f"tiles along K: expected the same of both operands, got {a.tile[1]} and {b.tile[0]}")
    zeros, normal = jnp.zeros((m, n), jnp.float32), (a.form.smallest_normal, b.form.smallest_normal)
    a_scale, b_scale = _rows(a.scale, a.tile[0], m), _rows(b.scale.T, b.tile[1], n).T
    n_tiles = a_scale.shape[1]
    if how.carries:
        if n_tiles == 1 and start is None:  # the core sees values, and one scale follows
            return tensor_core(a.values, b.values, zeros, how.reading, normal) * a_scale * b_scale
        # There is no such core: a scale for each tile would need a register for each. It adds up the numbers themselves.
        return tensor_core(a.astype(jnp.float32), b.astype(jnp.float32), zeros if start is None else start, how.reading)
    interval = min(how.interval, -(-k // GROUP) * GROUP)
    x, y = a.values, b.values
    if side % interval and n_tiles > 1:  # several scales between two promotions: again the numbers themselves
        x, y = a.astype(jnp.float32), b.astype(jnp.float32)
        a_scale, b_scale, normal = jnp.ones((1, 1), jnp.float32), jnp.ones((1, 1), jnp.float32), (0.0, 0.0)
    x, y = jnp.pad(x, ((0, 0), (0, -k % interval))), jnp.pad(y, ((0, -k % interval), (0, 0)))
    tile = jnp.minimum(jnp.arange(0, x.shape[1], interval, dtype=jnp.int32) // side, a_scale.shape[1] - 1)
    intervals = (
        x.reshape(m, x.shape[1] // interval, interval).transpose(1, 0, 2), y.reshape(y.shape[0] // interval, interval, n),
        a_scale.T[tile][:, :, None], b_scale[tile][:, None, :],
    )  # fmt: skip

    def promote(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        x, y, x_scale, y_scale = part
        return total + tensor_core(x, y, zeros, how.reading, normal) * x_scale * y_scale, None

    return lax.scan(promote, zeros if start is None else start, intervals)[0]


def _rows(scale: Array, side: int, size: int) -> Array:
    """Scales [tiles or 1, X] for each of `size` rows, or one row for all of them."""
    return scale if scale.shape[0] == 1 else jnp.repeat(scale, side, axis=0, total_repeat_length=size)


def tensor_core(
    a: Float[Array, "M K"],
    b: Float[Array, "K N"],
    start: Float[Array, "M N"],
    reading: Reading,
    normal: tuple[float, float] = (0.0, 0.0),
) -> Float[Array, "M N"]:
    """start + a b, as the tensor core adds. Operands have few enough bits that their products are exact in float32.

    `normal`: the smallest normal numbers of the operands' formats; 0 of what has an exponent of its own however small it is.
    """
    pad = -a.shape[1] % GROUP
    a, b = jnp.pad(a, ((0, 0), (0, pad))), jnp.pad(b, ((0, pad), (0, 0)))
    # One group after the other, each group's 32 outer products written out: XLA fuses them into two passes over [M, N].
    n_groups = a.shape[1] // GROUP
    groups = a.reshape(a.shape[0], n_groups, GROUP).transpose(1, 2, 0), b.reshape(n_groups, GROUP, b.shape[1])
    return lax.scan(partial(_add_group, reading, normal), start, groups)[0]


def _add_group(reading: Reading, normal: tuple[float, float], total: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
    largest = jnp.abs(total) if reading == "aligned" else jnp.zeros_like(total)
    powers = [jnp.where(x == 0, 0.0, jnp.maximum(_cut(jnp.abs(x), 1), least)) for x, least in zip(group, normal, strict=True)]
    for x, y in zip(*powers, strict=True):  # 1.5 x 1.5 counts as 1 x 1, not as 2
        largest = jnp.maximum(largest, x[:, None] * y[None, :])
    # The unit of the last of 14 bits below the largest exponent, and its inverse: powers of two that float32 has.
    exponent = jnp.maximum(lax.bitcast_convert_type(largest, jnp.uint32) >> 23, KEPT_BITS)
    unit = lax.bitcast_convert_type(exponent - (KEPT_BITS - 1) << 23, jnp.float32)
    inverse = lax.bitcast_convert_type(254 + (KEPT_BITS - 1) - exponent << 23, jnp.float32)
    units = jnp.trunc(total * inverse) if reading == "aligned" else jnp.zeros_like(total)
    for x, y in zip(*group, strict=True):
        units += jnp.trunc(x[:, None] * y[None, :] * inverse)  # less than 2^15 each: float32 adds them exactly
    return _cut(units * unit, KEPT_BITS) if reading == "aligned" else total + units * unit, None


def _cut(x: Array, bits: int) -> Array:
    """float32 cut towards zero to its leading `bits` of 24; with one bit, to a power of two."""
    kept = jnp.uint32(2**32 - 2 ** (24 - bits))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & kept, jnp.float32)
