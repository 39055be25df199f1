"""Quantisation in tiles [§3.3.2]: a scale for each 1 x 128, 128 x 1 or 128 x 128 values, from their largest magnitude now.

s = max(amax, floor) / largest, optionally raised to a power of two; q = round(x / s); x ~ s * q. Tiles at an edge are smaller.
A tile of zeros gives zeros. An infinity or a NaN makes all of its tile NaN: a step that meets one is seen to be broken.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.fp8.formats import E4M3, Format, pack, rounded, unpack

WHOLE = 0  # a tile's side that is the whole matrix's
FP8_BLOCK = 128  # rows and columns that share one scale in released checkpoints
RELEASED_FLOOR = 1e-4  # least amax of released code; not stated for training, where gradients are smaller


@dataclass(frozen=True)
class Quantiser:
    """How an operand [..., M, K] is rounded: `tile` rows and columns share a scale."""

    form: Format = E4M3
    tile: tuple[int, int] = (1, 128)
    power_of_two: bool = False  # scales, rounded up; exactly the values of UE8M0
    floor: float = RELEASED_FLOOR

    @property
    def transposed(self) -> "Quantiser":
        return replace(self, tile=self.tile[::-1])

    def row_bytes(self, size: Any) -> Any:
        """Bytes of `size` values packed, their scales included: one each, or four."""
        side = self.tile[1] or size
        return self.form.packed_size(size) + -(-size // side) * (1 if self.power_of_two else 4)

    def __str__(self) -> str:
        if self.tile == (WHOLE, WHOLE):
            scales = "tensor"
        else:
            scales = "x".join(str(side or "all") for side in self.tile)
        return f"{self.form.name} {scales}" + (" 2^n" if self.power_of_two else "")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """Values of a narrow format and the scales of their tiles; value * scale is the number.

    `values` [*stack, M, K]: float32, the format's dtype or its bits; packed E5M6 has rows of 3 K / 2 bytes. `scale` [*stack,
    ceil(M / tile), ceil(K / tile)]: float32, UE8M0, or UE8M0's bits. Both sides of the matrix may stand for several: `sides`.
    """

    values: Any
    scale: Any
    sides: tuple[int, ...] = field(metadata={"static": True})  # of the matrix: (M, K), or more whose products these are
    tile: tuple[int, int] = field(default=(128, 128), metadata={"static": True})
    form: Format = field(default=E4M3, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], *self.sides)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.values.dtype)

    @property
    def T(self) -> "Quantised":
        """Of a matrix, or of each in a stack."""
        whole = self if self.form.bits == 8 else self.wide()  # packed rows of 12 bits are no columns
        values, scale = (jnp.swapaxes(a, -1, -2) for a in (whole.values, self.scale))
        return Quantised(values, scale, self.sides[::-1], self.tile[::-1], self.form)

    def astype(self, dtype: Any) -> Array:
        """The numbers, a product in float32, rounded once to `dtype`."""
        wide = self.wide()
        m, k = wide.values.shape[-2:]
        return (wide.values * _spread(wide.scale, self.tile, (m, k))).astype(dtype).reshape(self.shape)

    def packed(self) -> "Quantised":
        """As bytes: what is kept between forward and backward pass, or sent. Float32 scales stay so; UE8M0's become bytes."""
        return replace(self, values=pack(self.values, self.form))

    def wide(self) -> "Quantised":
        """Values and scales in float32."""
        values, scale = self.values, self.scale
        if values.dtype == jnp.uint8:
            values = unpack(values, self.form, _columns(self))
        if scale.dtype == jnp.uint8:
            scale = lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)
        return replace(self, values=values.astype(jnp.float32), scale=scale.astype(jnp.float32))


def _columns(matrix: Quantised) -> int:
    """K, which packed bytes do not tell; matrices whose sides are products have 8 bits."""
    return matrix.values.shape[-1] if matrix.form.bits == 8 else matrix.sides[-1]


def quantise(x: Float[Array, "*stack M K"], how: Quantiser, before: Float[Array, ""] | None = None) -> Quantised:
    """Rounded, with values and scales in float32.

    `before`: delayed scaling takes this magnitude, of earlier steps, for every tile's own, unless it is 0: none is known yet.
    """
    x = x.astype(jnp.float32)
    amax = _amax(x, how.tile)
    if before is not None:  # what is not finite now must be seen, not saturated
        amax = jnp.where((before > 0) & jnp.isfinite(amax), before, amax)
    scale = scale_of(amax, how)
    values = rounded(x / _spread(scale, how.tile, x.shape[-2:]), how.form)
    return Quantised(values, scale, x.shape[-2:], how.tile, how.form)


def scale_of(amax: Float[Array, "*shape"], how: Quantiser) -> Float[Array, "*shape"]:
    """max(amax, floor) / largest, as a power of two the next one up."""
    scale = jnp.maximum(amax, how.floor) / how.form.largest
    return raised(scale) if how.power_of_two else scale


def raised(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^ceil(log2 scale) of positive normal numbers; NaN and infinity stay."""
    up = lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0x7FFFFF) & jnp.uint32(0x7F800000)
    return jnp.where(jnp.isnan(scale), scale, lax.bitcast_convert_type(up, jnp.float32))


def with_scale_bits(matrix: Quantised) -> Quantised:
    """Scales that are powers of two as bytes, their exponents: UE8M0."""
    bits = lax.bitcast_convert_type(matrix.scale, jnp.uint32) >> 23
    return replace(matrix, scale=bits.astype(jnp.uint8))


def _sides(tile: tuple[int, int], shape: tuple[int, ...]) -> list[int]:
    """A tile's sides within a matrix."""
    return [min(side or size, size) or 1 for side, size in zip(tile, shape[-2:], strict=True)]


def _amax(x: Array, tile: tuple[int, int]) -> Array:
    """[*stack, M, K] -> largest magnitude of each tile; infinity where there is a NaN, which XLA's maximum on CPU may lose."""
    (m, k), (rows, columns) = x.shape[-2:], _sides(tile, x.shape)
    if m % rows or k % columns:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -m % rows), (0, -k % columns)])
    # As integers, in whose order a NaN is the largest.
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    tiles = bits.reshape(*x.shape[:-2], -(-m // rows), rows, -(-k // columns), columns)
    largest = jnp.minimum(tiles.max(axis=(-3, -1)), jnp.uint32(0x7F800000))
    return lax.bitcast_convert_type(largest, jnp.float32)


def _spread(scale: Array, tile: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """A tile's scale at each of its values, or where it is broadcast to them: [*stack, M or 1, K or 1]."""
    for axis, side, size in zip((-2, -1), _sides(tile, shape), shape[-2:], strict=True):
        if 1 < side < size:
            scale = lax.slice_in_dim(jnp.repeat(scale, side, axis=axis), 0, size, axis=axis)
    return scale
