"""The transformer [§2.1]: embedding, leading dense layers, scanned MoE layers, final norm; logits where they are wanted.

`tokens -> embed -> blocks -> norm`, and every MoE block hands on `(x, routing)`. Layers of one kind are stacked and scanned,
so that compile time does not grow with depth.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import remat
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import rms_norm, swiglu, swiglu_spec
from dsv3_jax.model.mla import attention, attention_spec
from dsv3_jax.model.rope import rope_tables
from dsv3_jax.model.spec import Spec, SpecTree, gain, stacked
from dsv3_jax.moe.layer import moe, moe_spec
from dsv3_jax.moe.router import Routing
from dsv3_jax.parallel.collectives import Placement, gathered, lookup, sum_over_tensor

Summary = Callable[[Routing, Any], Any]  # (routing, extra) -> what the scan keeps of one layer


class Context(NamedTuple):
    """What every layer shares: rotary tables, segments where documents do not see each other, and the mesh, if any."""

    rope: tuple[Float[Array, "B T J"], Float[Array, "B T J"]]
    segments_BT: Int[Array, "B T"] | None
    placement: Placement | None = None


class Hidden(NamedTuple):
    """A forward pass up to the head. `layers` is what `summary` kept of each MoE layer, stacked by layer."""

    normed_BTD: Float[Array, "B T D"]  # after the final norm: what the head reads
    residual_BTD: Float[Array, "B T D"]  # before it
    layers: Any


def block_spec(config: ModelConfig, *, dense: bool) -> SpecTree:
    hidden = config.hidden_size
    return {
        "input_layernorm": gain(hidden, "embed"),
        "self_attn": attention_spec(config),
        "post_attention_layernorm": gain(hidden, "embed"),
        "mlp": swiglu_spec(hidden, config.intermediate_size) if dense else moe_spec(config),
    }


def transformer_spec(config: ModelConfig) -> SpecTree:
    """The main model's parameters."""
    spec: dict[str, Any] = {"embed_tokens": table_spec(config)}
    if config.n_dense_layers:
        spec["dense_layers"] = stacked(block_spec(config, dense=True), config.n_dense_layers)
    if config.n_main_moe_layers:
        spec["moe_layers"] = stacked(block_spec(config, dense=False), config.n_main_moe_layers)
    spec["norm"] = gain(config.hidden_size, "embed")
    if not config.tie_word_embeddings:
        spec["lm_head"] = table_spec(config)
    return spec


def document_positions(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart where the segment changes."""
    index = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None, :], segment_ids_BT.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids_BT[:, :1], bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def make_context(
    segment_ids_BT: Int[Array, "B T"], config: ModelConfig, *, cross_document: bool, placement: Placement | None = None
) -> Context:
    """Causal attention; without `cross_document`, within a segment only and with positions that restart in each."""
    if cross_document:
        index = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
        return Context(rope_tables(jnp.broadcast_to(index[None, :], segment_ids_BT.shape), config), None, placement)
    return Context(rope_tables(document_positions(segment_ids_BT), config), segment_ids_BT, placement)


def table_spec(config: ModelConfig) -> Spec:
    """Of the embedding, and of the head."""
    return Spec((config.vocab_size, config.hidden_size), ("vocab", "embed"))


def embed(
    params: Mapping[str, Any], tokens: Int[Array, "B T"], config: ModelConfig, placement: Placement | None = None
) -> Float[Array, "B T D"]:
    table_VD = gathered(params["embed_tokens"], table_spec(config), placement, config.compute_dtype)
    return lookup(table_VD.astype(jnp.dtype(config.compute_dtype)), tokens, placement)


def head_name(config: ModelConfig) -> str:
    return "embed_tokens" if config.tie_word_embeddings else "lm_head"


def head(params: Mapping[str, Any], config: ModelConfig, placement: Placement | None = None) -> Float[Array, "V D"]:
    """The output head; on one of several tensor ranks, its rows of it."""
    return gathered(params[head_name(config)], table_spec(config), placement, config.compute_dtype)


def logits(params: Mapping[str, Any], normed_BTD: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T V"]:
    """float32 logits of all positions; training uses the chunked loss instead."""
    weight_VD = head(params, config).astype(normed_BTD.dtype)
    return jnp.einsum("btd,vd->btv", normed_BTD, weight_VD, preferred_element_type=jnp.float32)


def block(
    params: Mapping[str, Any],
    bias_E: Float[Array, " E"] | None,
    x_BTD: Float[Array, "B T D"],
    context: Context,
    config: ModelConfig,
    forced_BTK: Int[Array, "B T K"] | None = None,
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """Pre-norm attention and feed-forward; a mixture of experts where a router bias is given, `forced` as in `route`."""
    placement = context.placement
    params = gathered(params, block_spec(config, dense=bias_E is None), placement, config.compute_dtype)
    normed = rms_norm(x_BTD, params["input_layernorm"], config.rms_norm_eps)
    attended = attention(params["self_attn"], normed, context.rope, context.segments_BT, config)
    x_BTD = remat.name(x_BTD + sum_over_tensor(attended, placement), remat.RESIDUAL)
    normed = rms_norm(x_BTD, params["post_attention_layernorm"], config.rms_norm_eps)
    if bias_E is None:
        return x_BTD + sum_over_tensor(swiglu(params["mlp"], normed, config), placement), None
    out_BTD, routing = moe(params["mlp"], bias_E, normed, config, placement, forced_BTK)
    return x_BTD + out_BTD, routing


def keep_routing(routing: Routing, extra: Any) -> Routing:
    """The summary that keeps everything: chosen experts, gates, scores and margins of every layer."""
    return routing


def forward(
    params: Mapping[str, Any],
    bias_LE: Float[Array, "L E"],
    tokens_BT: Int[Array, "B T"],
    context: Context,
    config: ModelConfig,
    *,
    summary: Summary = keep_routing,
    extras: Any = None,
    forced_LBTK: Int[Array, "M B T K"] | None = None,
) -> Hidden:
    """The main model. `bias_LE` has a row for each MoE layer (rows of MTP layers, if any follow, are not read).

    `summary(routing, extra)` is applied inside the scan to each MoE layer's routing and that layer's row of `extras`, so
    that training keeps counts and a loss where a study keeps all of it. `forced_LBTK`: experts to use (`moe.router.route`), a
    row for each MoE layer of the main model; E where a token is free.
    """
    x_BTD = embed(params, tokens_BT, config, context.placement)

    def dense_layer(x: Array, layer: Any) -> tuple[Array, None]:
        return block(layer, None, x, context, config)[0], None

    def moe_layer(x: Array, layer: Any) -> tuple[Array, Any]:
        weights, bias_E, extra, forced_BTK = layer
        x, routing = block(weights, bias_E, x, context, config, forced_BTK)
        assert routing is not None
        return x, summary(routing, extra)

    if config.n_dense_layers:
        x_BTD, _ = jax.lax.scan(remat.rematerialised(dense_layer, config), x_BTD, params["dense_layers"])
    kept = None
    if config.n_main_moe_layers:
        layers = (params["moe_layers"], bias_LE[: config.n_main_moe_layers], extras, forced_LBTK)
        x_BTD, kept = jax.lax.scan(remat.rematerialised(moe_layer, config), x_BTD, layers)
    return Hidden(rms_norm(x_BTD, params["norm"], config.rms_norm_eps), x_BTD, kept)
