"""Multi-token prediction, eqs. 21-25 [§2.2]: a chain of modules with their own block, sharing embedding and head.

Depth k joins the previous depth's hidden state at position i with the embedding of token i+k and predicts token i+k+1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax import remat
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.spec import Spec, SpecTree, gain
from dsv3_jax.model.transformer import Context, Hidden, Summary, block, block_spec, embed, keep_routing
from dsv3_jax.parallel.collectives import gathered


class Depth(NamedTuple):
    """One depth's output: `normed_BTD` after its own final norm (what the shared head reads), its layer's summary."""

    normed_BTD: Float[Array, "B T D"]
    residual_BTD: Float[Array, "B T D"]
    layer: Any


def mtp_spec(config: ModelConfig) -> SpecTree:
    hidden = config.hidden_size
    return {
        "enorm": gain(hidden, "embed"),
        "hnorm": gain(hidden, "embed"),
        "eh_proj": Spec((2 * hidden, hidden), ("embed_pair", "embed")),
        "block": block_spec(config, dense=False),
        "norm": gain(hidden, "embed"),  # shared_head.norm in released checkpoints
    }


def shifted(values_BT: Int[Array, "B T"], k: int) -> Int[Array, "B T"]:
    """values[:, i+k] at position i; 0 in the last k positions."""
    return jnp.pad(values_BT, ((0, 0), (0, k)))[:, k:]


def predicts_within_document(segment_ids_BS: Int[Array, "B S"], k: int) -> Bool[Array, "B T"]:
    """Where depth k (0: the main model) has a target: tokens i and i+k+1 lie in the same document, none is padding.

    `segment_ids` covers inputs and the last target, S = T + 1; documents are contiguous, so i+k lies between them.
    """
    inputs = segment_ids_BS[:, :-1]
    return (inputs != 0) & (inputs == shifted(segment_ids_BS, k + 1)[:, :-1])


def module(
    params: Mapping[str, Any],
    bias_E: Float[Array, " E"],
    hidden_BTD: Float[Array, "B T D"],
    embedding_BTD: Float[Array, "B T D"],
    context: Context,
    config: ModelConfig,
    forced_BTK: Int[Array, "B T K"] | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Eqs. 21-22: one transformer block over the pair. Returns the residual stream and its routing, `forced` as in `route`."""
    eh_proj = gathered(params["eh_proj"], mtp_spec(config)["eh_proj"], context.placement, config.compute_dtype)
    x_BTD = module_input({**params, "eh_proj": eh_proj}, hidden_BTD, embedding_BTD, config)
    return block(params["block"], bias_E, x_BTD, context, config, forced_BTK)


def module_input(
    params: Mapping[str, Any], hidden_BTD: Float[Array, "B T D"], embedding_BTD: Float[Array, "B T D"], config: ModelConfig
) -> Float[Array, "B T D"]:
    """Eq. 21: norm both, project the pair."""
    pair = [
        rms_norm(embedding_BTD, params["enorm"], config.rms_norm_eps),
        rms_norm(hidden_BTD, params["hnorm"], config.rms_norm_eps),
    ]
    if config.mtp_concat == "hidden_first":
        pair.reverse()
    return jnp.concatenate(pair, axis=-1) @ params["eh_proj"].astype(hidden_BTD.dtype)


def all_layers(main: Hidden, depths: Sequence[Depth]) -> Any:
    """What `summary` kept of every MoE layer, the main model's first, stacked."""
    if not depths:
        return main.layers
    behind = jax.tree.map(lambda *rows: jnp.stack(rows), *(d.layer for d in depths))
    return behind if main.layers is None else jax.tree.map(lambda *parts: jnp.concatenate(parts), main.layers, behind)


def mtp_forward(
    params: Mapping[str, Any],
    bias_LE: Float[Array, "L E"],
    tokens_BT: Int[Array, "B T"],
    main: Hidden,
    context: Context,
    config: ModelConfig,
    *,
    summary: Summary = keep_routing,
    extras: Any = None,
    forced_LBTK: Int[Array, "M B T K"] | None = None,
) -> list[Depth]:
    """Every depth's hidden states, from the main model's. Rows without a target hold values that nothing may read.

    `bias_LE` has a row for each MoE layer, the main model's first; `extras`, for `summary`, and `forced_LBTK`, experts
    to use (`moe.router.route`), a row for each depth.
    """

    def one_depth(hidden_BTD: Array, layer: Any) -> tuple[Array, Any]:
        weights, bias_E, embedding_BTD, extra, forced_BTK = layer
        x_BTD, routing = module(weights, bias_E, hidden_BTD, embedding_BTD, context, config, forced_BTK)
        return x_BTD, summary(routing, extra)

    depths: list[Depth] = []
    hidden = main.normed_BTD if config.mtp_hidden == "post_norm" else main.residual_BTD
    for k in range(1, config.num_nextn_predict_layers + 1):
        weights, extra, forced_BTK = jax.tree.map(lambda a, row=k - 1: a[row], (params["mtp"], extras, forced_LBTK))
        bias_E = bias_LE[config.n_main_moe_layers + k - 1]
        embedding = embed(params, shifted(tokens_BT, k), config, context.placement)
        x_BTD, kept = remat.rematerialised(one_depth, config)(hidden, (weights, bias_E, embedding, extra, forced_BTK))
        normed = rms_norm(x_BTD, weights["norm"], config.rms_norm_eps)
        depths.append(Depth(normed, x_BTD, kept))
        hidden = normed if config.mtp_hidden == "post_norm" else x_BTD
    return depths
