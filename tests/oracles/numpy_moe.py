"""Router, mixture of experts and load balancing in NumPy float64: one token at a time."""

from typing import Any

import numpy as np

from oracles.numpy_layers import linear, sigmoid, softmax, swiglu

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]
Routing = dict[str, Any]


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values, best first; among equals the lower index comes first."""
    return np.argsort(-values, kind="stable")[:count]


def route_token(
    logits_E: np.ndarray,
    bias_E: np.ndarray,
    *,
    num_experts_per_tok: int,
    n_group: int = 1,
    topk_group: int = 1,
    group_score_topk: int = 2,
    scoring_func: str = "sigmoid",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    dropped_fill: float = -np.inf,
    forced_K: np.ndarray | None = None,
) -> Routing:
    """One token's choice of experts.

    Returns `scores` [E], `biased` [E], `group_scores` [G], `kept_groups` (best first), `indices` [K] (best first),
    `gates` [K] in that order, `margin`: the K-th minus the (K+1)-th biased score among the experts of kept groups, and
    `group_margin`: the last kept minus the first dropped group score; both are inf where nothing was left out.
    `dropped_fill` other than -inf reproduces a known bug and is there to show that tests notice it. `forced_K` are experts to
    use in place of those chosen, unless the first is no expert; margins remain the choice's.
    """
    experts, per_group = len(logits_E), len(logits_E) // n_group
    assert per_group * n_group == experts and num_experts_per_tok <= topk_group * per_group
    scores = {"sigmoid": sigmoid, "softmax": softmax}[scoring_func](logits_E)
    biased = scores + bias_E  # for the choice only; gates come from `scores`

    by_group = biased.reshape(n_group, per_group)
    group_scores = np.sort(by_group, axis=1)[:, ::-1][:, :group_score_topk].sum(axis=1)
    groups_in_order = largest(group_scores, n_group)
    kept_groups = groups_in_order[:topk_group]
    eligible = np.full_like(by_group, dropped_fill)
    eligible[kept_groups] = by_group[kept_groups]
    eligible = eligible.reshape(experts)

    in_order = largest(eligible, experts)
    indices = in_order[:num_experts_per_tok]
    if forced_K is not None and forced_K[0] < experts:
        indices = np.asarray(forced_K)
    gates = scores[indices]
    if norm_topk_prob:
        gates = gates / (gates.sum() + 1e-20)
    return {
        "scores": scores,
        "biased": biased,
        "group_scores": group_scores,
        "kept_groups": kept_groups,
        "indices": indices,
        "gates": gates * routed_scaling_factor,
        "margin": _gap(eligible[in_order], num_experts_per_tok),
        "group_margin": _gap(group_scores[groups_in_order], topk_group),
    }


def _gap(descending: np.ndarray, kept: int) -> float:
    return np.inf if kept >= len(descending) else descending[kept - 1] - descending[kept]


def router_settings(config: Config) -> dict[str, Any]:
    """The keyword arguments of `route_token` that a config.json stands for."""
    return {
        "num_experts_per_tok": config["num_experts_per_tok"],
        "n_group": config["n_group"],
        "topk_group": config["topk_group"],
        # V2's selection takes the group's best score; V3's sums two. `group_score_topk` is our own field.
        "group_score_topk": config.get("group_score_topk", 1 if config["topk_method"] == "group_limited_greedy" else 2),
        "scoring_func": config["scoring_func"],
        "norm_topk_prob": config["norm_topk_prob"],
        "routed_scaling_factor": config["routed_scaling_factor"],
    }


def route(logits: np.ndarray, bias_E: np.ndarray, *, forced: np.ndarray | None = None, **settings: Any) -> Routing:
    """`route_token` for logits [..., E] and, if given, `forced` [..., K]; fields of the result have the same leading axes."""
    rows = logits.reshape(-1, logits.shape[-1])
    forced_NK = [None] * len(rows) if forced is None else forced.reshape(len(rows), -1)
    tokens = [route_token(row, bias_E, **settings, forced_K=f) for row, f in zip(rows, forced_NK, strict=True)]
    stacked = {key: np.stack([token[key] for token in tokens]) for key in tokens[0]}
    return {"logits": logits} | {key: rows.reshape(*logits.shape[:-1], *rows.shape[1:]) for key, rows in stacked.items()}


def moe(
    x_TD: np.ndarray, tensors: Tensors, prefix: str, config: Config, forced_TK: np.ndarray | None = None
) -> tuple[np.ndarray, Routing]:
    """Routed plus shared experts of one sequence, [T, D] -> ([T, D], routing). `prefix` is `model.layers.{i}.mlp.`"""
    logits_TE = linear(x_TD, tensors[f"{prefix}gate.weight"])
    bias_E = tensors.get(f"{prefix}gate.e_score_correction_bias", np.zeros(logits_TE.shape[-1]))
    routing = route(logits_TE, bias_E, forced=forced_TK, **router_settings(config))
    outputs = []
    for x_D, indices_K, gates_K in zip(x_TD, routing["indices"], routing["gates"], strict=True):
        y_D = np.zeros_like(x_D)
        for expert, gate in zip(indices_K, gates_K, strict=True):
            y_D += gate * swiglu(x_D, tensors, f"{prefix}experts.{expert}.")
        if config["n_shared_experts"]:
            y_D += swiglu(x_D, tensors, f"{prefix}shared_experts.")
        outputs.append(y_D)
    return np.stack(outputs), routing


def expert_counts(indices: np.ndarray, experts: int, valid: np.ndarray) -> np.ndarray:
    """How many valid tokens chose each expert: indices [..., K], valid [...] bool -> int64 [E]."""
    counts = np.zeros(experts, np.int64)
    for chosen_K, is_valid in zip(indices.reshape(-1, indices.shape[-1]), valid.reshape(-1), strict=True):
        if is_valid:
            counts[chosen_K] += 1  # the K experts of a token are distinct
    return counts


def _load_times_probability(indices: np.ndarray, probabilities: np.ndarray, valid: np.ndarray) -> float:
    """sum_i f_i P_i over the valid tokens: f_i = E / (K tokens) * count_i, P_i = mean probability of expert i."""
    experts, tokens = probabilities.shape[-1], int(valid.sum())
    f_E = experts / (indices.shape[-1] * tokens) * expert_counts(indices, experts, valid)
    p_E = probabilities[valid].sum(axis=0) / tokens
    return float(np.sum(f_E * p_E))


def _normalised(scores: np.ndarray) -> np.ndarray:
    return scores / scores.sum(axis=-1, keepdims=True)


def sequence_wise_loss(scores_BTE: np.ndarray, indices_BTK: np.ndarray, valid_BT: np.ndarray) -> float:
    """The report's balance loss before its coefficient: per sequence, averaged over sequences with a valid token.

    `scores` are the unbiased affinities, normalised here over all experts. A perfectly even load gives 1.
    """
    losses = [
        _load_times_probability(indices_BTK[b], _normalised(scores_BTE[b]), valid_BT[b])
        for b in range(len(scores_BTE))
        if valid_BT[b].any()
    ]
    return float(np.mean(losses)) if losses else 0.0


def batch_wise_loss(scores_BTE: np.ndarray, indices_BTK: np.ndarray, valid_BT: np.ndarray) -> float:
    """As `sequence_wise_loss`, with load and probability taken over the whole batch at once."""
    return _load_times_probability(indices_BTK, _normalised(scores_BTE), valid_BT) if valid_BT.any() else 0.0


def classical_loss(logits_BTE: np.ndarray, indices_BTK: np.ndarray, valid_BT: np.ndarray) -> float:
    """The auxiliary loss of Switch and its successors: over the batch, with softmax(logits) as probability."""
    return _load_times_probability(indices_BTK, softmax(logits_BTE), valid_BT) if valid_BT.any() else 0.0


def sign_bias_update(bias_E: np.ndarray, counts_E: np.ndarray, rate: float) -> np.ndarray:
    """bias + rate * sign(mean load - load); compared as integers, so that an exactly even load is exactly 0."""
    counts_E = np.asarray(counts_E, np.int64)
    return bias_E + rate * np.sign(counts_E.sum() - len(counts_E) * counts_E)


def max_violation(counts_E: np.ndarray) -> float:
    """MaxVio = largest load / mean load - 1; 0 where nothing was routed."""
    total = int(np.sum(counts_E))
    return float(np.max(counts_E) * len(counts_E) / total - 1.0) if total else 0.0
