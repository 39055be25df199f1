"""One linear operation, y = x W, as three FP8 products [§3.3.1, figure 6]: Fprop, Dgrad and Wgrad.

Between forward and backward pass the input is kept as it was rounded, one byte a value. Wgrad sums over tokens, so there both
operands are rounded anew, in tiles along the tokens. Gradients are those of the rounded operands' product, handed through the
rounding as if it were not there.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.fp8.accumulate import Accumulation, product
from dsv3_jax.fp8.quantize import Quantised, Quantiser, quantise, with_scale_bits


@dataclass(frozen=True)
class Products:
    """How the three products of a linear operation are computed. Tiles are those of x and dy [N, .] and of W [in, out]."""

    x: Quantiser  # of Fprop
    weight: Quantiser
    gradient: Quantiser  # of Dgrad
    x_wgrad: Quantiser
    gradient_wgrad: Quantiser
    accumulation: Accumulation = Accumulation()


def keep(x: Float[Array, "N C"], how: Quantiser) -> Quantised:
    """x rounded, in as few bytes as it takes."""
    return packed(quantise(x, how), how)


def packed(matrix: Quantised, how: Quantiser) -> Quantised:
    return (with_scale_bits(matrix) if how.power_of_two else matrix).packed()


def rounded_weight(weight: Any, how: Products) -> Quantised:
    """Blocks of a matrix [in, out] or of a stack; one that was stored in FP8 is taken as it is."""
    return weight.wide() if isinstance(weight, Quantised) else quantise(weight, how.weight)


def fprop(x: Quantised, weight: Any, how: Products) -> Float[Array, "N O"]:
    return product(x, rounded_weight(weight, how), how.accumulation)


def dgrad(dy: Float[Array, "N O"], weight: Any, how: Products) -> Float[Array, "N I"]:
    return product(quantise(dy, how.gradient), rounded_weight(weight, how).T, how.accumulation)


def wgrad(x: Float[Array, "N I"], dy: Float[Array, "N O"], how: Products) -> Float[Array, "I O"]:
    return product(quantise(x, how.x_wgrad).T, quantise(dy, how.gradient_wgrad), how.accumulation)


def linear(x: Float[Array, "*batch I"], weight: Any, how: Products, kept: Quantised | None = None) -> Float[Array, "*batch O"]:
    """x W, in x's dtype; the gradient of `weight` [in, out] comes in its own dtype, unrounded.

    `kept`: what stands for x in the backward pass, [N, in] packed; without it, x as Fprop rounds it. A `weight` that is
    Quantised (of a released checkpoint) is multiplied as it is, and has no gradient.
    """
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Quantised):
        y = fprop(quantise(flat, how.x), weight, how).astype(x.dtype)
    else:
        y = _linear(flat, weight, kept, how)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x_NI: Array, weight_IO: Array, kept: Quantised | None, how: Products) -> Array:
    return fprop(quantise(x_NI, how.x), weight_IO, how).astype(x_NI.dtype)


def _forward(x_NI: Array, weight_IO: Array, kept: Quantised | None, how: Products) -> tuple[Array, Any]:
    x = quantise(x_NI, how.x)
    y = fprop(x, weight_IO, how).astype(x_NI.dtype)
    return y, (packed(x, how.x) if kept is None else kept, weight_IO, jnp.zeros((0,), x_NI.dtype))


def _backward(how: Products, saved: Any, dy_NO: Array) -> tuple[Array, Array, Any]:
    x, weight_IO, like_x = saved
    dx = dgrad(dy_NO, weight_IO, how).astype(like_x.dtype)
    dw = wgrad(x.astype(jnp.float32), dy_NO, how).astype(weight_IO.dtype)
    return dx, dw, None


_linear.defvjp(_forward, _backward)
