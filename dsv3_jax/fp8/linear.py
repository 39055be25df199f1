"""One linear operation, y = x W, as three FP8 products [§3.3.1, figure 6]: Fprop, Dgrad and Wgrad.

Between forward and backward pass the input is kept as it was rounded, one byte a value. Wgrad sums over tokens, so there both
operands are rounded anew, in tiles along the tokens. Gradients are those of the rounded operands' product, handed through the
rounding as if it were not there. Rounding and products are XLA's, or our own kernels' (`dsv3_jax.kernels.scaled`, `.quantise`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.fp8.accumulate import Accumulation, product
from dsv3_jax.fp8.delayed import NOT_DELAYED, Amax, largest, magnitude, observed, parted
from dsv3_jax.fp8.quantize import FP8_BLOCK, Quantised, Quantiser, quantise, with_scale_bits
from dsv3_jax.kernels.quantise import api as kernels
from dsv3_jax.kernels.scaled.api import scaled_product, scaled_product_transposed


@dataclass(frozen=True)
class Products:
    """How the three products of a linear operation are computed. Tiles are those of x and dy [N, .] and of W [in, out]."""

    x: Quantiser  # of Fprop
    weight: Quantiser
    gradient: Quantiser  # of Dgrad
    x_wgrad: Quantiser
    gradient_wgrad: Quantiser
    accumulation: Accumulation = Accumulation()
    implementation: str = "xla"  # or a kernel's, as `kernels.modes` has it: for operands of 8 bits in fine tiles of 128

    @property
    def in_kernels(self) -> bool:
        return self.implementation != "xla"

    def rounded(self, x: Float[Array, "*stack M K"], how: Quantiser, before: Float[Array, ""] | None = None) -> Quantised:
        """An operand [.., M, K] as one of the above rounds it."""
        if self.in_kernels:
            return kernels.quantise(x, how, implementation=self.implementation)
        return quantise(x, how, before)

    def rounded_along_rows(self, x: Any, before: Float[Array, ""] | None = None) -> Quantised:
        """x [N, I], an array or as it was kept, as Wgrad's first operand: for kernels, which want it so, transposed."""
        if not self.in_kernels:
            return quantise(x.astype(jnp.float32), self.x_wgrad, before)
        if isinstance(x, Quantised) and x.form.bits == 8 and x.tile == (1, FP8_BLOCK):
            return kernels.requantise_transposed(x, self.x_wgrad, implementation=self.implementation)
        return self.rounded(x.astype(jnp.float32), self.x_wgrad).T


def keep(x: Float[Array, "N C"], how: Quantiser) -> Quantised:
    """x rounded, in as few bytes as it takes."""
    return packed(quantise(x, how), how)


def packed(matrix: Quantised, how: Quantiser) -> Quantised:
    return (with_scale_bits(matrix) if how.power_of_two else matrix).packed()


def rounded_weight(weight: Any, how: Products, before: Amax = NOT_DELAYED) -> Quantised:
    """Blocks of a matrix [in, out] or of a stack; one that was stored in FP8 is taken as it is."""
    return weight if isinstance(weight, Quantised) else how.rounded(weight, how.weight, before.weight)


def fprop(x: Quantised, weight: Any, how: Products, dtype: Any, before: Amax = NOT_DELAYED) -> Float[Array, "N O"]:
    weight = rounded_weight(weight, how, before)
    if how.in_kernels:
        return scaled_product(x, weight, dtype=dtype, implementation=how.implementation)
    return product(x, weight, how.accumulation).astype(dtype)


def dgrad(dy: Float[Array, "N O"], weight: Any, how: Products, dtype: Any, before: Amax = NOT_DELAYED) -> Float[Array, "N I"]:
    weight, dy8 = rounded_weight(weight, how, before), how.rounded(dy, how.gradient, before.gradient)
    if how.in_kernels:
        return scaled_product_transposed(dy8, weight, dtype=dtype, implementation=how.implementation)
    return product(dy8, weight.T, how.accumulation).astype(dtype)


def wgrad(x: Any, dy: Float[Array, "N O"], how: Products, dtype: Any, before: Amax = NOT_DELAYED) -> Float[Array, "I O"]:
    """`x` [N, I]: an array, or as it was kept."""
    x8, dy8 = how.rounded_along_rows(x, before.x), how.rounded(dy, how.gradient_wgrad, before.gradient)
    if how.in_kernels:
        return scaled_product(x8, dy8, dtype=dtype, implementation=how.implementation)
    return product(x8.T, dy8, how.accumulation).astype(dtype)


def linear(x: Float[Array, "*batch I"], weight: Any, how: Products, kept: Quantised | None = None) -> Float[Array, "*batch O"]:
    """x W, in x's dtype; the gradient of `weight` [in, out] comes in its own dtype, unrounded.

    `kept`: what stands for x in the backward pass, [N, in] packed; without it, x as Fprop rounds it. A `weight` that is
    Quantised (of a released checkpoint) is multiplied as it is, and has no gradient; one that is Delayed brings its history.
    """
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Quantised):
        matrix = replace(weight, sides=weight.values.shape[-2:])
        y = fprop(how.rounded(flat, how.x), matrix, how, x.dtype)
    else:
        y = _linear(flat, *parted(weight), kept, how)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear(x_NI: Array, weight_IO: Array, history: Array | None, kept: Quantised | None, how: Products) -> Array:
    return _forward(x_NI, weight_IO, history, kept, how)[0]


def _forward(x_NI: Array, weight_IO: Array, history: Array | None, kept: Quantised | None, how: Products) -> tuple[Array, Any]:
    before = largest(history)
    x = how.rounded(x_NI, how.x, before.x)
    y = fprop(x, weight_IO, how, x_NI.dtype, before)
    amax_x = None if history is None else magnitude(x_NI)
    return y, (packed(x, how.x) if kept is None else kept, weight_IO, history, amax_x, jnp.zeros((0,), x_NI.dtype))


def _backward(how: Products, saved: Any, dy_NO: Array) -> tuple[Array, Array, Any, None]:
    x, weight_IO, history, amax_x, like_x = saved
    before = largest(history)
    dx = dgrad(dy_NO, weight_IO, how, like_x.dtype, before)
    dw = wgrad(x, dy_NO, how, weight_IO.dtype, before)
    return dx, dw, observed(history, amax_x, weight_IO, dy_NO), None


_linear.defvjp(_forward, _backward)
