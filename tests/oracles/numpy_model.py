"""The whole of DeepSeek-V3 in NumPy float64: blocks, main model, multi-token prediction, cross entropy.

Takes a dict of tensors under their checkpoint names, in checkpoint orientation (out, in), and the config.json as a dict.
Everything of the reference can be imported from here.
"""

from typing import Any

import numpy as np

from oracles.numpy_attention import (
    Config,
    Tensors,
    attend,
    attention,
    attention_mask,
    key_value_heads,
    mla,
    rope_frequencies,
    rope_multiplier,
    rotate,
    softmax_scale,
    standard_attention,
)
from oracles.numpy_layers import linear, numerical_gradient, rms_norm, sigmoid, softmax, swiglu
from oracles.numpy_moe import (
    Routing,
    batch_wise_loss,
    classical_loss,
    expert_counts,
    max_violation,
    moe,
    route,
    route_token,
    router_settings,
    sequence_wise_loss,
    sign_bias_update,
)

__all__ = [
    "Config", "Routing", "Tensors", "aligned_targets", "as_float64", "attend", "attention", "attention_mask",
    "batch_wise_loss", "block", "classical_loss", "cross_entropy", "expert_counts", "forward", "is_moe_layer",
    "key_value_heads", "linear", "max_violation", "mla", "moe", "mtp_forward", "numerical_gradient", "rms_norm",
    "rope_frequencies", "rope_multiplier", "rotate", "route", "route_token", "router_settings", "sequence_wise_loss",
    "sigmoid", "sign_bias_update", "softmax", "softmax_scale", "standard_attention", "swiglu",
]  # fmt: skip


def as_float64(tensors: Tensors) -> Tensors:
    return {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}


def is_moe_layer(layer: int, config: Config) -> bool:
    """Leading layers are dense; a layer past the last main one belongs to multi-token prediction and follows the same rule."""
    return layer >= config["first_k_dense_replace"] and layer % config.get("moe_layer_freq", 1) == 0


def block(
    x_TD: np.ndarray,
    tensors: Tensors,
    layer: int,
    config: Config,
    positions_T: np.ndarray,
    mask_TT: np.ndarray,
    forced_TK: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Routing | None]:
    """One pre-norm transformer block of one sequence: (x after it, what attention added, what the FFN added, routing)."""
    prefix, eps = f"model.layers.{layer}.", config["rms_norm_eps"]
    normed_TD = rms_norm(x_TD, tensors[f"{prefix}input_layernorm.weight"], eps)
    attended_TD = attention(normed_TD, tensors, f"{prefix}self_attn.", config, positions_T, mask_TT)
    x_TD = x_TD + attended_TD
    normed_TD = rms_norm(x_TD, tensors[f"{prefix}post_attention_layernorm.weight"], eps)
    routing = None
    if is_moe_layer(layer, config):
        fed_TD, routing = moe(normed_TD, tensors, f"{prefix}mlp.", config, forced_TK)
    else:
        fed_TD = swiglu(normed_TD, tensors, f"{prefix}mlp.")
    return x_TD + fed_TD, attended_TD, fed_TD, routing


def _blocks_over_batch(
    x_BTD: np.ndarray,
    tensors: Tensors,
    layer: int,
    config: Config,
    segment_ids_BT: np.ndarray | None,
    forced: dict[int, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Routing | None]:
    length = x_BTD.shape[1]
    rows = []
    for b, x_TD in enumerate(x_BTD):
        mask_TT = attention_mask(length, None if segment_ids_BT is None else segment_ids_BT[b])
        forced_TK = forced[layer][b, :length] if forced and layer in forced else None
        rows.append(block(x_TD, tensors, layer, config, np.arange(length), mask_TT, forced_TK))
    x, attended, fed, routings = zip(*rows, strict=True)
    routing = None
    if routings[0] is not None:
        routing = {key: np.stack([one[key] for one in routings]) for key in routings[0]}
    return np.stack(x), np.stack(attended), np.stack(fed), routing


def forward(
    tensors: Tensors,
    config: Config,
    tokens_BT: np.ndarray,
    segment_ids_BT: np.ndarray | None = None,
    *,
    forced: dict[int, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The main model. Segments, where given, isolate documents in attention; padding is segment 0 and is computed like any.

    `forced`: experts [B, T, K] to use by MoE layer, as in `numpy_moe.route_token`; `mtp_forward` takes those of its layers.

    Returns `hidden_embed`, per layer i `attn_out_{i}`, `mlp_out_{i}` and `hidden_{i}` (the residual stream after it),
    `hidden_final` (after the final norm), all [B, T, D], `logits` [B, T, V], and `routing`: {MoE layer: record} with
    `logits`, `scores`, `biased` [B, T, E], `indices`, `gates` [B, T, K], `margin`, `group_margin` [B, T].
    """
    tensors = as_float64(tensors)
    x_BTD = tensors["model.embed_tokens.weight"][tokens_BT]
    result: dict[str, Any] = {"hidden_embed": x_BTD, "routing": {}}
    for layer in range(config["num_hidden_layers"]):
        x_BTD, attended, fed, routing = _blocks_over_batch(x_BTD, tensors, layer, config, segment_ids_BT, forced)
        result |= {f"attn_out_{layer}": attended, f"mlp_out_{layer}": fed, f"hidden_{layer}": x_BTD}
        if routing is not None:
            result["routing"][layer] = routing
    result["hidden_final"] = rms_norm(x_BTD, tensors["model.norm.weight"], config["rms_norm_eps"])
    result["logits"] = linear(result["hidden_final"], tensors["lm_head.weight"])
    return result


def mtp_forward(
    tensors: Tensors,
    config: Config,
    main: dict[str, Any],
    tokens_BS: np.ndarray,
    segment_ids_BS: np.ndarray | None = None,
    *,
    hidden_after_norm: bool = True,
    embedding_first: bool = True,
    forced: dict[int, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """The chain of multi-token-prediction modules on top of `main`, which is `forward` of the first T of the S tokens.

    S is T, or T + 1 where the last label is known too. Module k = 1, 2, ... joins, at position i, the hidden state of
    module k-1 (0: the main model) with the embedding of token i+k, for the positions i < min(T, S - k) at which that token
    exists; their rotary position is i and their attention segment is that of token i. It predicts token i+k+1.

    hidden_after_norm: the state handed on is taken after its own final norm (`model.norm`, or the module's
    `shared_head.norm`), as released weights need, or before it. embedding_first: `eh_proj` sees [embedding ; hidden], as
    released weights need, or the report's [hidden ; embedding].

    Returns per module `input` (eh_proj's output), `hidden` (block output), `logits`, `routing` over those positions.
    """
    tensors, eps = as_float64(tensors), config["rms_norm_eps"]
    last_layer = config["num_hidden_layers"] - 1
    previous_BTD = main["hidden_final"] if hidden_after_norm else main[f"hidden_{last_layer}"]
    modules = []
    for depth in range(1, config["num_nextn_predict_layers"] + 1):
        layer = last_layer + depth
        prefix = f"model.layers.{layer}."
        length = min(previous_BTD.shape[1], tokens_BS.shape[1] - depth)
        embedded_BTD = tensors["model.embed_tokens.weight"][tokens_BS[:, depth : depth + length]]
        embedding = rms_norm(embedded_BTD, tensors[f"{prefix}enorm.weight"], eps)
        hidden = rms_norm(previous_BTD[:, :length], tensors[f"{prefix}hnorm.weight"], eps)
        joined = [embedding, hidden] if embedding_first else [hidden, embedding]
        input_BTD = linear(np.concatenate(joined, axis=-1), tensors[f"{prefix}eh_proj.weight"])
        segment_ids_BT = None if segment_ids_BS is None else segment_ids_BS[:, :length]
        hidden_BTD, _, _, routing = _blocks_over_batch(input_BTD, tensors, layer, config, segment_ids_BT, forced)
        normed_BTD = rms_norm(hidden_BTD, tensors[f"{prefix}shared_head.norm.weight"], eps)
        logits_BTV = linear(normed_BTD, tensors["lm_head.weight"])  # embedding and head are the main model's own
        modules.append({"input": input_BTD, "hidden": hidden_BTD, "logits": logits_BTV, "routing": routing})
        previous_BTD = normed_BTD if hidden_after_norm else hidden_BTD
    return modules


def aligned_targets(
    tokens_BS: np.ndarray, length: int, depth: int, segment_ids_BS: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What each of `length` positions must predict at a depth (0: the main model): targets [B, length], valid [B, length].

    Position i predicts token i + depth + 1. It counts only if that token exists and the tokens i .. i+depth+1 that it
    reads and predicts are all in one segment other than 0 (padding). Targets of positions that do not count are 0.
    """
    batch, known = tokens_BS.shape
    targets = np.zeros((batch, length), tokens_BS.dtype)
    valid = np.zeros((batch, length), bool)
    for b in range(batch):
        for i in range(length):
            target = i + depth + 1
            if target >= known:
                continue
            if segment_ids_BS is not None:
                used = segment_ids_BS[b, i : target + 1]
                if used[0] == 0 or (used != used[0]).any():
                    continue
            targets[b, i], valid[b, i] = tokens_BS[b, target], True
    return targets, valid


def cross_entropy(logits_BTV: np.ndarray, targets_BT: np.ndarray, valid_BT: np.ndarray) -> float:
    """Mean over the valid positions of -log softmax(logits)[target], in nats; 0 where none is valid."""
    losses = []
    for logits_V, target, is_valid in zip(
        logits_BTV.reshape(-1, logits_BTV.shape[-1]), targets_BT.reshape(-1), valid_BT.reshape(-1), strict=True
    ):
        if is_valid:
            shifted_V = np.asarray(logits_V, np.float64) - np.max(logits_V)
            losses.append(np.log(np.sum(np.exp(shifted_V))) - shifted_V[target])
    return float(np.mean(losses)) if losses else 0.0
