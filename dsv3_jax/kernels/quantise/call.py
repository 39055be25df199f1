"""What the implementations of quantisation have in common: how they are called."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import Format
from dsv3_jax.fp8.quantize import Quantiser

SIDE = 128
TILES = ((1, SIDE), (SIDE, 1), (SIDE, SIDE))


class Quantise(Protocol):
    def __call__(self, x_SMK: jax.Array, how: Quantiser, *, scale_bits: bool, interpret: Any) -> tuple[jax.Array, jax.Array]:
        """Of each matrix: values [S, M, K] in the format's dtype, scales [S, tiles, tiles] in float32 or as bytes."""


class Requantise(Protocol):
    def __call__(
        self, values_RI: jax.Array, scale: jax.Array, form: Format, how: Quantiser, *, scale_bits: bool, interpret: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Of `form`, with float32 scales [R, ceil(I / SIDE)] -> values [I, R], scales [I, ceil(R / SIDE)]."""


class SwigluQuantise(Protocol):
    def __call__(
        self, g_RF: jax.Array, u_RF: jax.Array, gates_R: jax.Array | None, how: Quantiser, *, scale_bits: bool, interpret: Any
    ) -> tuple[jax.Array, jax.Array]:
        """silu(g) * u, times the row's gate if there is one: values [R, F], scales [R, ceil(F / SIDE)]."""


def magnitudes(x: jax.Array) -> jax.Array:
    """|x|, of a NaN infinity: not every maximum hands a NaN on (XLA's on CPU does not), and either makes the tile NaN."""
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))


def cast(y: jax.Array, form: Format) -> jax.Array:
    """float32, up to the format's largest value within rounding, in the format; what becomes 0 without its sign."""
    least = 2.0 ** (form.least_exponent - form.mantissa_bits)
    return jnp.where(jnp.abs(y) <= 0.5 * least, 0.0, y).astype(form.dtype)
