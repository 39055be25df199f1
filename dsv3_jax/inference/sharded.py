"""Layers that serve on a mesh [§3.4]: one `shard_map` over a stack of them, with a cache; replicated experts included.

On a rank: b sequences of T new tokens, N = b * T, the same on all tensor ranks of a group; n = ceil(N / tensor) are its own.

    own tokens -> norm -> all ranks' tokens -> own heads' attention -> sum, own tokens -> norm -> dense, or experts anywhere
                  (all_gather)                (psum_scatter)                            (exchange over expert x tensor ranks)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.attention import cached_attention
from dsv3_jax.inference.experts import gated
from dsv3_jax.inference.mesh import ServingPlacement
from dsv3_jax.inference.placement import Replicas, physical_indices
from dsv3_jax.inference.serving import Serving
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.rope import rope_tables
from dsv3_jax.moe.experts import chosen_implementation, routed_experts
from dsv3_jax.moe.router import route
from dsv3_jax.parallel.all_to_all import exchanged_experts
from dsv3_jax.parallel.collectives import varying
from dsv3_jax.parallel.mesh import TENSOR


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """L layers of one kind, in pieces. Of MoE layers the experts are physical: slot r is a copy of expert phy2log[r]."""

    params: Any  # [L, ...], laid out as `deploy.stack_spec` says
    bias_LE: Any  # [L, E] of logical experts; None: dense layers
    replicas: Replicas | None
    placement: ServingPlacement = field(metadata={"static": True})
    specs: tuple[PartitionSpec, ...] = field(metadata={"static": True})  # of the parameters' leaves

    @property
    def n_layers(self) -> int:
        return self.params["input_layernorm"].shape[0]


def stack_blocks(
    stack: Stack,
    x_BTD: Float[Array, "B T D"],
    rows_LBSC: Shaped[Array, "L B S C"],
    start_B: Int[Array, " B"],
    going_BT: Bool[Array, "B T"],
    config: ModelConfig,
    *,
    absorbed: bool,
) -> tuple[Float[Array, "B T D"], Shaped[Array, "L B S C"], Int[Array, "L R"] | None]:
    """As `decode.cached_block`, layer after layer; and how many rows every slot computed.

    B is a multiple of the ranks that divide sequences. Tokens that are not `going` (padding, sequences that have ended) choose
    no expert: what comes of them is not to be read.
    """
    placement, tree = stack.placement, jax.tree.structure(stack.params)
    whole, batch = PartitionSpec(), PartitionSpec(placement.batch_axes)
    rows = PartitionSpec(None, placement.batch_axes)
    local = partial(_local, config=config, placement=placement, absorbed=absorbed)
    mapped = jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(jax.tree.unflatten(tree, stack.specs), whole, whole, batch, rows, batch, batch),
        out_specs=(batch, rows, whole),
    )
    return mapped(stack.params, stack.bias_LE, stack.replicas, x_BTD, rows_LBSC, start_B, going_BT)


def placement_of(model: Serving) -> ServingPlacement | None:
    """Of a model on a mesh."""
    first = model.layers[0]
    return first.placement if isinstance(first, Stack) else None


class _Tokens:
    """The tensor ranks' shares of a group's N tokens, the last one padded."""

    def __init__(self, n_tokens: int, placement: ServingPlacement):
        self.ranks = placement.sizes[TENSOR]
        self.total, self.own = n_tokens, -(-n_tokens // self.ranks)

    def _padded(self, values: Array) -> Array:
        return jnp.pad(values, [(0, self.ranks * self.own - self.total)] + [(0, 0)] * (values.ndim - 1))

    def share(self, values: Array) -> Array:
        """The rank's own of what all ranks have."""
        if self.ranks == 1:
            return values
        return lax.dynamic_slice_in_dim(self._padded(values), lax.axis_index(TENSOR) * self.own, self.own)

    def together(self, own: Array) -> Array:
        """All tokens, the same on every rank."""
        if self.ranks == 1:
            return own
        return lax.all_gather(own, TENSOR, axis=0, tiled=True, to="invarying")[: self.total]

    def summed(self, parts: Array) -> Array:
        """The rank's own tokens of the sum over ranks of [N, D] parts."""
        if self.ranks == 1:
            return parts
        return lax.psum_scatter(self._padded(parts), TENSOR, scatter_dimension=0, tiled=True)


def _local(
    params: Any, bias_LE: Any, replicas: Any, x_BTD: Array, rows_LBSC: Array, start_B: Array, going_BT: Array,
    *, config: ModelConfig, placement: ServingPlacement, absorbed: bool,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """A rank's program."""
    batch, length, hidden = x_BTD.shape
    tokens = _Tokens(batch * length, placement)
    position_BT = start_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    rope, going_n = rope_tables(position_BT, config), tokens.share(going_BT.reshape(-1))
    # Differs among tokens of a step, and for a sequence from step to step: copies of an expert take turns.
    rank = lax.axis_index(placement.batch_axes) if placement.batch_axes else 0
    sequence_B = rank * batch + jnp.arange(batch, dtype=jnp.int32)
    number_n = tokens.share((sequence_B[:, None] * length + position_BT).reshape(-1))

    def layer(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Array | None]:
        x_nD, rows_LBSC = carry
        i, weights, bias_E, own_replicas = inputs
        normed_BTD = tokens.together(rms_norm(x_nD, weights["input_layernorm"], config.rms_norm_eps)).reshape(x_BTD.shape)
        attended_BTD, rows_LBSC = cached_attention(
            weights["self_attn"], normed_BTD, rows_LBSC, start_B, rope, config, absorbed=absorbed, layer=i
        )
        x_nD = x_nD + tokens.summed(attended_BTD.reshape(-1, hidden))
        normed_nD = rms_norm(x_nD, weights["post_attention_layernorm"], config.rms_norm_eps)
        if bias_E is None:
            return (x_nD + gated(weights["mlp"], normed_nD), rows_LBSC), None
        out_nD, count_R = _experts(weights["mlp"], bias_E, own_replicas, normed_nD, going_n, number_n, config, placement)
        return (x_nD + out_nD, rows_LBSC), count_R

    n_layers = rows_LBSC.shape[0]
    x_nD = varying(tokens.share(x_BTD.reshape(-1, hidden)), placement.token_axes)
    layers = jnp.arange(n_layers, dtype=jnp.int32), params, bias_LE, replicas
    (x_nD, rows_LBSC), count_LR = lax.scan(layer, (x_nD, varying(rows_LBSC, placement.batch_axes)), layers)
    if count_LR is not None and placement.token_axes:
        count_LR = lax.psum(varying(count_LR, placement.token_axes), placement.token_axes)
    return tokens.together(x_nD).reshape(x_BTD.shape), rows_LBSC, count_LR


def _experts(
    params: Mapping[str, Any], bias_E: Array, replicas: Replicas, u_nD: Array, going_n: Array, number_n: Array,
    config: ModelConfig, placement: ServingPlacement,
) -> tuple[Array, Array]:  # fmt: skip
    """The sum of eq. 12 for a rank's own tokens, wherever the experts' copies are; and the rows of every slot."""
    routing = route(u_nD, params["gate"], bias_E, config)
    indices_nK, gates_nK = routing.indices, routing.gates
    n_routed, n_experts = config.n_routed_experts, placement.n_experts(config)
    if n_experts > n_routed:
        # A shared expert is one more that every token chooses, with a gate of 1 [§3.4.2].
        shared = jnp.broadcast_to(jnp.arange(n_routed, n_experts, dtype=jnp.int32)[None, :], (len(u_nD), n_experts - n_routed))
        indices_nK = jnp.concatenate([indices_nK, shared], axis=1)
        gates_nK = jnp.concatenate([gates_nK, jnp.ones(shared.shape, jnp.float32)], axis=1)
    indices_nK = jnp.where(going_n[:, None], indices_nK, n_experts)
    slots_nK = physical_indices(indices_nK, number_n, replicas)
    count_R = jnp.zeros(replicas.phy2log.shape, jnp.int32)
    count_R = varying(count_R, placement.token_axes).at[slots_nK.reshape(-1)].add(1, mode="drop")
    experts = {name: weight.astype(u_nD.dtype) for name, weight in params["experts"].items()}
    implementation = chosen_implementation(config.experts_implementation, placement.platform)
    here = partial(routed_experts, implementation=implementation)
    if placement.expert_axes:
        y_nD = exchanged_experts(u_nD, slots_nK, gates_nK, experts, here, placement)
    else:
        y_nD = here(u_nD, slots_nK, gates_nK, experts)
    if config.n_shared_experts and n_experts == n_routed:
        y_nD = y_nD + gated(params["shared_experts"], u_nD)
    return y_nD, count_R
