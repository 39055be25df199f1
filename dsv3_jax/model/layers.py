"""RMSNorm and SwiGLU [§2.1]."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import remat
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


def swiglu(params: Mapping[str, Any], x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """down(silu(gate(x)) * up(x)); weights are cast to x's dtype."""
    gate, up, down = (params[name].astype(x.dtype) for name in ("gate_proj", "up_proj", "down_proj"))
    x = varying_like(params, x)  # so that tensor ranks sum x's gradient once, and not each product's share of it
    g, u = (remat.name(x @ weight, remat.SWIGLU_INPUT) for weight in (gate, up))
    return remat.keep_inputs(lambda g, u: jax.nn.silu(g) * u)(g, u) @ down
