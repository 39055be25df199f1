"""RMSNorm, linear operations and SwiGLU [§2.1], in the formats of the precision table [§3.3.1]."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import remat
from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8 import linear as fp8
from dsv3_jax.fp8.delayed import largest, magnitude, observed, parted
from dsv3_jax.fp8.precision import products, swiglu_cache
from dsv3_jax.fp8.quantize import Quantised, Quantiser, quantise
from dsv3_jax.kernels.quantise.api import swiglu_quantise
from dsv3_jax.model.spec import Spec, SpecTree
from dsv3_jax.parallel.collectives import varying_like


def rms_norm(x: Float[Array, "*batch D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, in float32; returns x's dtype."""

    @remat.keep_inputs
    def normalise(x: Array, gain: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
        return (normed * gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + gain.shape)).astype(x.dtype)

    return normalise(x, gain)


def swiglu_spec(hidden: int, width: int, axis: str = "mlp") -> SpecTree:
    return {
        "gate_proj": Spec((hidden, width), ("embed", axis)),
        "up_proj": Spec((hidden, width), ("embed", axis)),
        "down_proj": Spec((width, hidden), (axis, "embed")),
    }


def linear(
    params: Mapping[str, Any],
    name: str,
    x: Float[Array, "*batch I"],
    config: ModelConfig,
    kept: Quantised | None = None,
) -> Float[Array, "*batch O"]:
    """x times `params[name]`, both of whose sides may be several axes; in FP8 where the table says so, else in x's dtype.

    `kept`: what the backward pass has for x, in FP8.
    """
    weight, how = params[name], products(config, name)
    if how is None:
        weight = weight.astype(x.dtype)
    if weight.ndim > 2 and not isinstance(weight, Quantised):
        inputs = weight.shape[:-1] if name == "o_proj" else weight.shape[:1]
        weight = weight.reshape(math.prod(inputs), -1)
    if how is None:
        return x @ weight
    x, weight = varying_like((x, weight), (x, weight))
    return fp8.linear(x, weight, how, kept)


def swiglu(params: Mapping[str, Any], x: Float[Array, "*batch D"], config: ModelConfig) -> Float[Array, "*batch D"]:
    """down(silu(gate(x)) * up(x)); weights are cast to x's dtype."""
    x = varying_like(params, x)  # so that tensor ranks sum x's gradient once, and not each product's share of it
    cache = swiglu_cache(config)
    if cache is None:
        g, u = (remat.name(linear(params, name, x, config), remat.SWIGLU_INPUT) for name in ("gate_proj", "up_proj"))
        return linear(params, "down_proj", remat.keep_inputs(silu_times)(g, u), config)
    how = products(config, "down_proj")
    assert how is not None, config.fp8
    g, u = (linear(params, name, x, config).reshape(-1, params[name].shape[-1]) for name in ("gate_proj", "up_proj"))
    y = _gated_down(*varying_like((g, params), (g, u, *parted(params["down_proj"]))), how, cache)
    return y.reshape(x.shape)


def silu_times(g: Float[Array, "*batch F"], u: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    return jax.nn.silu(g) * u


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gated_down(g_NF: Array, u_NF: Array, weight_FD: Any, history: Array | None, how: fp8.Products, cache: Quantiser) -> Array:
    """SwiGLU and its down projection, with the inputs alone kept, in FP8, and the product of both computed again [§3.2.3]."""
    before = largest(history)
    if how.in_kernels:
        h = swiglu_quantise(g_NF, u_NF, how.x, implementation=how.implementation)
    else:
        h = quantise(silu_times(g_NF.astype(jnp.float32), u_NF.astype(jnp.float32)), how.x, before.x)
    return fp8.fprop(h, weight_FD, how, g_NF.dtype, before)


def _gated_down_forward(
    g_NF: Array, u_NF: Array, weight_FD: Any, history: Array | None, how: fp8.Products, cache: Quantiser
) -> tuple[Array, Any]:
    kept = remat.name(tuple(fp8.keep(v, cache) for v in (g_NF, u_NF)), remat.SWIGLU_INPUT)
    return _gated_down(g_NF, u_NF, weight_FD, history, how, cache), (kept, weight_FD, history)


def _gated_down_backward(how: fp8.Products, cache: Quantiser, saved: Any, dy_ND: Array) -> tuple[Array, Array, Array, Any]:
    kept, weight_FD, history = saved
    before = largest(history)
    h, pull_back = jax.vjp(silu_times, *(v.astype(jnp.float32) for v in kept))
    dg, du = (d.astype(dy_ND.dtype) for d in pull_back(fp8.dgrad(dy_ND, weight_FD, how, jnp.float32, before)))
    dweight = fp8.wgrad(h, dy_ND, how, weight_FD.dtype, before)
    return dg, du, dweight, observed(history, magnitude(h), weight_FD, dy_ND)


_gated_down.defvjp(_gated_down_forward, _gated_down_backward)
