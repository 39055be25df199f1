"""Routed experts for a few tokens, the sum of eq. 12 [§2.1.2]: each expert is multiplied where it lies, and not copied."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.bits import from_bits, to_bits
from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.serving import joined
from dsv3_jax.moe.dispatch import make_plan, take_rows
from dsv3_jax.moe.experts import routed_experts
from dsv3_jax.moe.router import Routing, route

# More rows (token, chosen expert) than this are sorted by expert in any case: its weights are then read once for all its rows.
MOST_ROWS = 64
BLOCK, LONG_BLOCK = 4, 32  # rows that an expert takes at a time


def moe(params: Mapping[str, Any], bias_E: Array, u_BTD: Array, config: ModelConfig) -> tuple[Array, Routing]:
    """As `dsv3_jax.moe.layer.moe`, for experts stacked or each by itself."""
    routing = route(u_BTD, params["gate"], bias_E, config)
    n_tokens, k = u_BTD.shape[0] * u_BTD.shape[1], config.num_experts_per_tok
    u_ND, indices_NK, gates_NK = u_BTD.reshape(n_tokens, -1), routing.indices.reshape(-1, k), routing.gates.reshape(-1, k)
    experts = params["experts"]
    apart = isinstance(experts["down_proj"], tuple)
    # Narrow weights take time to become numbers: once for several rows, once for all rows of a long prompt.
    narrow, many = apart and experts["down_proj"][0].dtype != jnp.float32, n_tokens * k > MOST_ROWS
    if not apart or (narrow and many):
        y_ND = routed_experts(u_ND, indices_NK, gates_NK, experts)
    elif many or (narrow and n_tokens > BLOCK):
        y_ND = expert_by_expert(u_ND, indices_NK, gates_NK, experts, block=LONG_BLOCK if many else BLOCK)
    else:
        y_ND = row_by_row(u_ND, indices_NK, gates_NK, experts)
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
    branches = _branches(experts)
    index_R, gate_R = indices_NK.reshape(-1), gates_NK.reshape(-1)

    def step(r: Array, y_ND: Array) -> Array:
        n = r // k
        row = lax.switch(index_R[r], branches, lax.dynamic_slice_in_dim(x_ND, n, 1))
        before = lax.dynamic_slice_in_dim(y_ND, n, 1)
        return lax.dynamic_update_slice_in_dim(y_ND, before + gate_R[r] * row, n, 0)

    return lax.fori_loop(0, n_tokens * k, step, jnp.zeros(x_ND.shape, jnp.float32)).astype(x_ND.dtype)


def expert_by_expert(
    x_ND: Float[Array, "N D"],
    indices_NK: Int[Array, "N K"],
    gates_NK: Float[Array, "N K"],
    experts: Mapping[str, Sequence[Any]],
    *,
    block: int = BLOCK,
) -> Float[Array, "N D"]:
    """As `row_by_row`, but each expert that was chosen takes its rows together, `block` at a time."""
    branches = _branches(experts)
    plan = make_plan(indices_NK, len(branches))
    # A last block reaches into the rows of the next expert, which overwrites what it left there.
    bits_RD = jnp.pad(to_bits(take_rows(x_ND, plan.token_R)), ((0, block), (0, 0)))
    chosen_first_E = jnp.argsort(plan.count_E == 0, stable=True)

    def expert(i: Array, y_RD: Array) -> Array:
        e = chosen_first_E[i]

        def some(j: Array, y_RD: Array) -> Array:
            start = plan.start_E[e] + j * block
            rows = lax.switch(e, branches, from_bits(lax.dynamic_slice_in_dim(bits_RD, start, block), x_ND.dtype))
            return lax.dynamic_update_slice_in_dim(y_RD, rows, start, 0)

        return lax.fori_loop(0, (plan.count_E[e] + block - 1) // block, some, y_RD)

    y_RD = lax.fori_loop(0, (plan.count_E > 0).sum(), expert, jnp.zeros(bits_RD.shape, jnp.float32))
    gated_NKD = take_rows(y_RD, plan.row_NK.reshape(-1)).reshape(*indices_NK.shape, -1) * gates_NK[:, :, None]
    return gated_NKD.sum(axis=1).astype(x_ND.dtype)


def _branches(experts: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Of each expert, a function of rows [R, D] to float32; an operand of a branch is not copied."""

    def branch(own: Mapping[str, Any]) -> Any:
        return lambda x_RD: gated(own, x_RD).astype(jnp.float32)

    return [branch(dict(zip(experts, own, strict=True))) for own in zip(*experts.values(), strict=True)]
