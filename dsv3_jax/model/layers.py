"""RMSNorm, SwiGLU, and the names that rematerialisation policies speak of [§2.1, §3.3]."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.spec import Spec, SpecTree

# What the report recomputes in the backward pass [§3.2.3]: norms, MLA's up-projections, the SwiGLU's output.
NORM, MLA_UP, SWIGLU = "norm", "mla_up", "swiglu"


# Elementwise functions keep their inputs alone for the backward pass, whatever the policy: recomputing the rest is cheaper
# than writing it to memory and reading it back.
_keep_inputs = partial(jax.checkpoint, prevent_cse=False)


def rms_norm(x: Float[Array, "*batch D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, in float32; returns x's dtype."""

    @_keep_inputs
    def normalise(x: Array, gain: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
        return (normed * gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + gain.shape)).astype(x.dtype)

    return checkpoint_name(normalise(x, gain), NORM)


def swiglu_spec(hidden: int, width: int, axis: str = "mlp") -> SpecTree:
    return {
        "gate_proj": Spec((hidden, width), ("embed", axis)),
        "up_proj": Spec((hidden, width), ("embed", axis)),
        "down_proj": Spec((width, hidden), (axis, "embed")),
    }


def swiglu(params: Mapping[str, Array], x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """down(silu(gate(x)) * up(x)); weights are cast to x's dtype."""
    gate, up, down = (params[name].astype(x.dtype) for name in ("gate_proj", "up_proj", "down_proj"))
    hidden = _keep_inputs(lambda g, u: jax.nn.silu(g) * u)(x @ gate, x @ up)
    return checkpoint_name(hidden, SWIGLU) @ down


def rematerialised(function: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """`function` (one block) under the config's named policy of what is kept for the backward pass.

    none: everything; report: everything but norms, MLA up-projections and SwiGLU outputs; full: the block's input alone.
    """
    if config.remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = {
        "report": policies.save_anything_except_these_names(NORM, MLA_UP, SWIGLU),
        "full": policies.nothing_saveable,
    }[config.remat]
    # Inside a scan XLA cannot undo the recomputation by common-subexpression elimination: the barrier is not needed.
    return jax.checkpoint(function, policy=policy, prevent_cse=False)
