"""Narrow floating-point formats [§3.3.2] and rounding to them: to nearest, ties to even, saturating.

Rounded values stay in float32, where arithmetic is fast; `pack` turns them into the bytes that a cache or a wire holds.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from dsv3_jax.bits import from_bits, to_bits


@dataclass(frozen=True)
class Format:
    """One sign bit, `exponent_bits`, `mantissa_bits`; values up to `largest`, subnormal below 2^`least_exponent`."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    least_exponent: int  # of normal numbers
    dtype: Any  # that holds it; for E5M6 a wider one

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.least_exponent

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    def packed_size(self, size: Any) -> Any:
        """Bytes of `size` values in a row."""
        return size if self.bits == 8 else size + -(-size // 2)


E4M3 = Format("e4m3", 4, 3, 448.0, -6, jnp.float8_e4m3fn)
E5M2 = Format("e5m2", 5, 2, 57344.0, -14, jnp.float8_e5m2)
# The report's own 12 bits; its bias and special values are not disclosed. Here float16's, whose upper 12 bits it then is.
E5M6 = Format("e5m6", 5, 6, 65024.0, -14, jnp.float16)
FORMATS = {form.name: form for form in (E4M3, E5M2, E5M6)}


def rounded(x: Float[Array, "*shape"], form: Format) -> Float[Array, "*shape"]:
    """The nearest value of the format, in float32; beyond the largest one, that. NaN stays NaN; infinities become the largest.

    The same values as the cast's, but for the sign of a zero, by adding and subtracting 1.5 * 2^23 units of x's last kept
    place: several times as fast.
    """
    x = jnp.clip(x.astype(jnp.float32), -form.largest, form.largest)
    exponent = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    least = jnp.uint32((127 + form.least_exponent) << 23)
    unit = lax.bitcast_convert_type(jnp.maximum(exponent, least) + jnp.uint32((23 - form.mantissa_bits) << 23), jnp.float32)
    shift = 1.5 * unit
    return (x + shift) - shift


def pack(values: Float[Array, "*rows C"], form: Format) -> UInt8[Array, "*rows X"]:
    """Values of the format as bytes: one each, or for 12 bits one each and then half a byte each, two in one."""
    bits = to_bits(values.astype(form.dtype))
    if form.bits == 8:
        return bits
    assert form.bits == 12, form
    low = (bits >> 4 & 15).astype(jnp.uint8)
    low = jnp.pad(low, [(0, 0)] * (low.ndim - 1) + [(0, low.shape[-1] % 2)])
    return jnp.concatenate([(bits >> 8).astype(jnp.uint8), low[..., ::2] | low[..., 1::2] << 4], axis=-1)


def unpack(packed: UInt8[Array, "*rows X"], form: Format, size: int) -> Float[Array, "*rows C"]:
    """`size` values a row, float32."""
    if form.bits == 8:
        return from_bits(packed, jnp.dtype(form.dtype)).astype(jnp.float32)
    high, pairs = packed[..., :size].astype(jnp.uint16), packed[..., size:]
    low = (
        jnp.stack([pairs & 15, pairs >> 4], axis=-1)
        .reshape(*pairs.shape[:-1], 2 * pairs.shape[-1])[..., :size]
        .astype(jnp.uint16)
    )
    return from_bits(high << 8 | low << 4, jnp.dtype(form.dtype)).astype(jnp.float32)
