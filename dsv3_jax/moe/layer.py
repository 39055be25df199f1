"""One DeepSeekMoE layer, eqs. 12-13 [§2.1.2]: route, dispatch, experts, combine, beside the shared experts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.precision import wire
from dsv3_jax.model.layers import swiglu, swiglu_spec
from dsv3_jax.model.spec import Spec, SpecTree
from dsv3_jax.moe.experts import chosen_implementation, routed_experts
from dsv3_jax.moe.fp8_experts import chosen_fp8_implementation, fp8_routed_experts
from dsv3_jax.moe.router import Routing, route
from dsv3_jax.parallel.all_to_all import exchanged_experts
from dsv3_jax.parallel.collectives import Placement, sum_over_tensor, varying_like
from dsv3_jax.parallel.mesh import EXPERT
from dsv3_jax.weights import is_stored


def moe_spec(config: ModelConfig) -> SpecTree:
    """Router, routed experts [E, ...] and one MLP as wide as all shared experts together."""
    hidden, width, n_experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    up = Spec((n_experts, hidden, width), ("experts", "embed", "expert_mlp"))
    spec: dict[str, Any] = {
        "gate": Spec((hidden, n_experts), ("embed", "router")),
        "experts": {
            "gate_proj": up,
            "up_proj": up,
            "down_proj": Spec((n_experts, width, hidden), ("experts", "expert_mlp", "embed")),
        },
    }
    if config.n_shared_experts:
        spec["shared_experts"] = swiglu_spec(hidden, config.n_shared_experts * width)
    return spec


def moe(
    params: Mapping[str, Any],
    bias_E: Float[Array, " E"],
    u_BTD: Float[Array, "B T D"],
    config: ModelConfig,
    placement: Placement | None = None,
    forced_BTK: Int[Array, "B T K"] | None = None,
) -> tuple[Float[Array, "B T D"], Routing]:
    """sum_i g_i FFN_i(u) + FFN_shared(u), and what the router decided, or was `forced` to. No token is dropped.

    Under a `placement`, `u_BTD` is the device's share of the batch and `params` its pieces; experts may be on other ranks.
    """
    routing = route(u_BTD, params["gate"], bias_E, config, forced_BTK)
    u_BTD = varying_like(params["experts"], u_BTD)  # once for all experts, shared ones too: its gradient is then summed once
    batch, length, hidden = u_BTD.shape
    flat = (batch * length, -1)
    name, platform = config.experts_implementation, placement.platform if placement else jax.default_backend()
    if config.fp8 is None:
        implementation = chosen_implementation(name, platform)
        experts = {n: w if is_stored(w) else w.astype(u_BTD.dtype) for n, w in params["experts"].items()}
        here = partial(routed_experts, implementation=implementation)
    else:
        experts = params["experts"]  # rounded from what they are, not from the compute dtype
        implementation = chosen_fp8_implementation(name, platform, config.fp8)
        here = partial(fp8_routed_experts, config=config, implementation=implementation)
    inputs = u_BTD.reshape(flat), routing.indices.reshape(flat), routing.gates.reshape(flat), experts
    if placement is None or placement.sizes[EXPERT] == 1:
        y_ND = here(*inputs)
    else:
        y_ND = exchanged_experts(*inputs, here, placement, wire(config))
    y_BTD = y_ND.reshape(batch, length, hidden)
    if config.n_shared_experts:
        y_BTD = y_BTD + swiglu(params["shared_experts"], u_BTD, config)
    return sum_over_tensor(y_BTD, placement), routing
