"""Routed experts for a few tokens, the sum of eq. 12 [§2.1.2]: one row after the other, each expert multiplied where it lies."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import swiglu
from dsv3_jax.moe.experts import routed_experts
from dsv3_jax.moe.router import Routing, route

# More rows (token, chosen expert) than this are sorted by expert, so that an expert's weights are read once for all of its rows.
MOST_ROWS = 64


def moe(params: Mapping[str, Any], bias_E: Array, u_BTD: Array, config: ModelConfig) -> tuple[Array, Routing]:
    """As `dsv3_jax.moe.layer.moe`, for experts stacked or each by itself."""
    routing = route(u_BTD, params["gate"], bias_E, config)
    n_tokens, k = u_BTD.shape[0] * u_BTD.shape[1], config.num_experts_per_tok
    u_ND, indices_NK, gates_NK = u_BTD.reshape(n_tokens, -1), routing.indices.reshape(-1, k), routing.gates.reshape(-1, k)
    experts = params["experts"]
    if isinstance(experts["gate_proj"], tuple) and n_tokens * k <= MOST_ROWS:
        y_ND = row_by_row(u_ND, indices_NK, gates_NK, experts)
    else:
        y_ND = routed_experts(u_ND, indices_NK, gates_NK, experts)
    y_BTD = y_ND.reshape(u_BTD.shape)
    if config.n_shared_experts:
        y_BTD = y_BTD + swiglu(params["shared_experts"], u_BTD)
    return y_BTD, routing


def row_by_row(
    x_ND: Float[Array, "N D"],
    indices_NK: Int[Array, "N K"],
    gates_NK: Float[Array, "N K"],
    experts: Mapping[str, Sequence[Any]],
) -> Float[Array, "N D"]:
    """sum_k gates[n, k] FFN_k(x_n), float32 until the end; each expert is an array of its own and is not copied."""
    n_tokens, k = indices_NK.shape

    def branch(gate: Any, up: Any, down: Any) -> Any:
        def apply(x_1D: Array) -> Array:
            g, u = (jnp.matmul(x_1D, w.astype(x_1D.dtype), preferred_element_type=jnp.float32) for w in (gate, up))
            a = (jax.nn.silu(g) * u).astype(x_1D.dtype)
            return jnp.matmul(a, down.astype(x_1D.dtype), preferred_element_type=jnp.float32)

        return apply

    branches = [branch(*w) for w in zip(*(experts[name] for name in ("gate_proj", "up_proj", "down_proj")), strict=True)]
    index_R, gate_R = indices_NK.reshape(-1), gates_NK.reshape(-1)

    def step(r: Array, y_ND: Array) -> Array:
        n = r // k
        row = lax.switch(index_R[r], branches, lax.dynamic_slice_in_dim(x_ND, n, 1))
        before = lax.dynamic_slice_in_dim(y_ND, n, 1)
        return lax.dynamic_update_slice_in_dim(y_ND, before + gate_R[r] * row, n, 0)

    return lax.fori_loop(0, n_tokens * k, step, jnp.zeros(x_ND.shape, jnp.float32)).astype(x_ND.dtype)
