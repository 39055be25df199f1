"""Routed experts for a few tokens, the sum of eq. 12 [§2.1.2]: row after row, each expert multiplied where it lies."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.serving import joined
from dsv3_jax.moe.experts import routed_experts
from dsv3_jax.moe.router import Routing, route

# More rows (token, chosen expert) than this are sorted by expert: an expert's weights are then read once for all of its rows.
MOST_ROWS = 64


def moe(params: Mapping[str, Any], bias_E: Array, u_BTD: Array, config: ModelConfig) -> tuple[Array, Routing]:
    """As `dsv3_jax.moe.layer.moe`, for experts stacked or each by itself."""
    routing = route(u_BTD, params["gate"], bias_E, config)
    n_tokens, k = u_BTD.shape[0] * u_BTD.shape[1], config.num_experts_per_tok
    u_ND, indices_NK, gates_NK = u_BTD.reshape(n_tokens, -1), routing.indices.reshape(-1, k), routing.gates.reshape(-1, k)
    experts = params["experts"]
    if isinstance(experts["down_proj"], tuple) and n_tokens * k <= MOST_ROWS:
        y_ND = row_by_row(u_ND, indices_NK, gates_NK, experts)
    else:
        y_ND = routed_experts(u_ND, indices_NK, gates_NK, experts)
    y_BTD = y_ND.reshape(u_BTD.shape)
    if config.n_shared_experts:
        y_BTD = y_BTD + gated(params["shared_experts"], u_BTD)
    return y_BTD, routing


def gated(params: Mapping[str, Any], x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """As `dsv3_jax.model.layers.swiglu`."""
    g, u = jnp.split(joined(params, ("gate_proj", "up_proj"), x), 2, axis=-1)
    return (jax.nn.silu(g) * u) @ params["down_proj"].astype(x.dtype)


def row_by_row(
    x_ND: Float[Array, "N D"],
    indices_NK: Int[Array, "N K"],
    gates_NK: Float[Array, "N K"],
    experts: Mapping[str, Sequence[Any]],
) -> Float[Array, "N D"]:
    """sum_k gates[n, k] FFN_k(x_n), summed in float32; each expert is an array of its own and is not copied."""
    n_tokens, k = indices_NK.shape

    def branch(own: Mapping[str, Any]) -> Any:
        return lambda x_1D: gated(own, x_1D).astype(jnp.float32)

    branches = [branch(dict(zip(experts, own, strict=True))) for own in zip(*experts.values(), strict=True)]
    index_R, gate_R = indices_NK.reshape(-1), gates_NK.reshape(-1)

    def step(r: Array, y_ND: Array) -> Array:
        n = r // k
        row = lax.switch(index_R[r], branches, lax.dynamic_slice_in_dim(x_ND, n, 1))
        before = lax.dynamic_slice_in_dim(y_ND, n, 1)
        return lax.dynamic_update_slice_in_dim(y_ND, before + gate_R[r] * row, n, 0)

    return lax.fori_loop(0, n_tokens * k, step, jnp.zeros(x_ND.shape, jnp.float32)).astype(x_ND.dtype)
