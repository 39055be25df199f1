"""Measures of routing [§2.1.2, §3.4, §4.5.3] over traces and journals: load, balance, margins, saturation, bias, traffic.

`experts_NK` holds each token's choices in one layer, `experts_NLK` in all of them: integers of any width, distinct within a
token, where n_experts and above stand for "none" and count nowhere. Arrays may be memory maps; they are walked in pieces.
What nothing was counted for is NaN.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.special import entr

from dsv3_jax.analysis.metrics import max_violation, relative_load
from dsv3_jax.inference.placement import device_loads, fullest_over_mean, place_experts
from dsv3_jax.parallel.traffic import Visits, summary, visits

PIECE = 2**20  # numbers that are in memory at a time


def pieces(n: int, numbers_each: int, at_least: int = 0) -> Iterator[slice]:
    """Slices over n rows that expand to `numbers_each` a row; `at_least`: the size of a table that is made of each slice."""
    rows = max(1, max(PIECE, at_least) // max(1, numbers_each))
    return (slice(i, i + rows) for i in range(0, n, rows))


def expert_ids(experts: Integer[np.ndarray, "*any"], n_experts: int) -> Integer[np.ndarray, "*any"]:
    """As int64 with n_experts for "none". Raises ValueError for negative ids, with which some engines say "none"."""
    ids = experts.astype(np.int64)
    if ids.size and ids.min() < 0:
        raise ValueError(f"experts: expected ids from 0 up, got {ids.min()}; write {n_experts} where there is no expert")
    return np.minimum(ids, n_experts)


def over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient in float64, NaN over 0. The shapes broadcast; a quotient without axes is an array too."""
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


# --- load and balance ---


def expert_load(experts: Integer[np.ndarray, "N *layers K"], n_experts: int) -> Integer[np.ndarray, "*layers E"]:
    """How many tokens chose each expert, int64."""
    n, layers, top_k = len(experts), experts.shape[1:-1], experts.shape[-1]
    n_layers = math.prod(layers)
    first_id_L1 = np.arange(n_layers)[:, None] * (n_experts + 1)
    load = np.zeros(n_layers * (n_experts + 1), np.int64)
    for piece in pieces(n, n_layers * top_k, len(load)):
        ids_NLK = expert_ids(experts[piece], n_experts).reshape(-1, n_layers, top_k)
        load += np.bincount((ids_NLK + first_id_L1[None]).ravel(), minlength=len(load))
    return load.reshape(*layers, n_experts + 1)[..., :n_experts]


def batch_loads(
    experts: Integer[np.ndarray, "N *layers K"], n_experts: int, batch_tokens: int
) -> Integer[np.ndarray, "T *layers E"]:
    """The load of each batch of `batch_tokens` successive tokens; those that do not fill a last one are left out."""
    starts = range(0, len(experts) - batch_tokens + 1, batch_tokens)
    out = np.zeros((len(starts), *experts.shape[1:-1], n_experts), np.int64)
    for i, start in enumerate(starts):
        out[i] = expert_load(experts[start : start + batch_tokens], n_experts)
    return out


def rank_load(load: Integer[np.ndarray, "*rows E"], n_ranks: int) -> Integer[np.ndarray, "*rows P"]:
    """The load of each expert-parallel rank, which holds E/P successive experts. Raises ValueError if P does not divide E."""
    n_experts = load.shape[-1]
    if n_ranks < 1 or n_experts % n_ranks:
        raise ValueError(f"n_ranks: expected a divisor of the {n_experts} experts, got {n_ranks}")
    return np.asarray(load.reshape(*load.shape[:-1], n_ranks, -1).sum(axis=-1))


class Violation(NamedTuple):
    """MaxVio = max load / mean load - 1 (arXiv 2408.15664, §4.1): 0 is balance, E - 1 one expert for all."""

    batch: Float[np.ndarray, "*layers"]  # MaxVio_batch: of each batch, averaged over the batches that chose an expert
    overall: Float[np.ndarray, "*layers"]  # MaxVio_global: of all batches' load together


def violation(load: Integer[np.ndarray, "T *layers E"]) -> Violation:
    """Of loads by batch: `batch_loads` of a trace, or a journal's load by step. With `rank_load`, the same of ranks."""
    layers = load.shape[1:-1]
    overall = np.zeros(load.shape[1:], np.int64)
    total, batches = np.zeros(layers), np.zeros(layers, np.int64)
    for piece in pieces(len(load), math.prod(load.shape[1:])):
        part = load[piece].astype(np.int64)
        counted = part.any(axis=-1)
        total += np.where(counted, max_violation(part), 0.0).sum(axis=0)
        batches += counted.sum(axis=0)
        overall += part.sum(axis=0)
    return Violation(over(total, batches), np.where(batches > 0, max_violation(overall[None])[0], np.nan))


def coefficient_of_variation(load: Integer[np.ndarray, "*rows E"]) -> Float[np.ndarray, "*rows"]:
    """Standard deviation over mean, of all E experts (not a sample of them): 0 is balance, sqrt(E - 1) one expert for all."""
    return np.where(load.any(axis=-1), relative_load(load).std(axis=-1), np.nan)


def gini(load: Integer[np.ndarray, "*rows E"]) -> Float[np.ndarray, "*rows"]:
    """Mean absolute difference of two experts' loads over twice the mean load: 0 is balance, 1 - 1/E one expert for all."""
    n_experts = load.shape[-1]
    ranked = np.sort(relative_load(load), axis=-1)
    twice = ranked @ (2.0 * np.arange(1, n_experts + 1) - n_experts - 1)
    return np.where(load.any(axis=-1), twice / n_experts**2, np.nan)


class Entropy(NamedTuple):
    bits: Float[np.ndarray, "*rows"]
    share: Float[np.ndarray, "*rows"]  # of log2(E), the entropy of balance; 1 if there is but one expert


def load_entropy(load: Integer[np.ndarray, "*rows E"]) -> Entropy:
    """-sum p log2 p over experts' shares p of the load: how evenly a *text* is spread, however sharp each token's gates are."""
    n_experts = load.shape[-1]
    bits = np.where(load.any(axis=-1), entr(relative_load(load) / n_experts).sum(axis=-1) / math.log(2), np.nan)
    share = bits / math.log2(n_experts) if n_experts > 1 else np.where(np.isnan(bits), np.nan, 1.0)
    return Entropy(bits, np.asarray(share))


def gate_entropy(
    gates: Float[np.ndarray, "N *layers K"], experts: Integer[np.ndarray, "N *layers K"], n_experts: int
) -> Float[np.ndarray, "*layers"]:
    """Bits, mean over tokens of -sum g log2 g over a *token's* gates, their sum made 1: 0 is one expert, log2(K) equal ones.

    Says nothing of balance, which is `load_entropy`'s. Tokens without an expert or a positive gate are left out.
    """
    total, tokens = np.zeros(gates.shape[1:-1]), np.zeros(gates.shape[1:-1], np.int64)
    for piece in pieces(len(gates), math.prod(gates.shape[1:])):
        chosen = expert_ids(experts[piece], n_experts) < n_experts
        weights = np.where(chosen, gates[piece].astype(np.float64), 0.0)
        sums = weights.sum(axis=-1, keepdims=True)
        shares = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
        total += entr(shares).sum(axis=(0, -1)) / math.log(2)
        tokens += (sums[..., 0] > 0).sum(axis=0)
    return over(total, tokens)


def dead_experts(load: Integer[np.ndarray, "*rows E"], share: float = 0.0) -> Bool[np.ndarray, "*rows E"]:
    """Experts with less than `share` of their row's mean load; with 0, and in any case, those that were never chosen."""
    return (load == 0) | (relative_load(load) < share)


# --- margins ---


class Margins(NamedTuple):
    tokens: int  # whose margin is finite; it is not where no expert was left out
    quantiles: Float[np.ndarray, " levels"]
    near_ties: Float[np.ndarray, " thresholds"]  # share of tokens with a margin below the threshold


def margins(margins_N: Float[np.ndarray, " N"], levels: Sequence[float], thresholds: Sequence[float]) -> Margins:
    """Of the biased score of the last expert chosen minus that of the first one left out, in units of the score (0 to 1)."""
    values = margins_N.astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    below = np.searchsorted(values, np.asarray(thresholds, np.float32), side="left")
    if not len(values):
        return Margins(0, np.full(len(levels), np.nan), np.full(len(thresholds), np.nan))
    return Margins(len(values), np.quantile(values.astype(np.float64), levels), below / len(values))


# --- over training ---


def saturation(checkpoints: Sequence[Integer[np.ndarray, "N *layers K"]], n_experts: int) -> Float[np.ndarray, "M *layers"]:
    """Share of the final choices that each checkpoint makes too: |ours & final| / K, mean over tokens (arXiv 2409.02060, §5.1).

    All have the same tokens; the last is the final one, whose row is 1. Where it chose k < K experts, k takes the place of K.
    Raises ValueError for checkpoints of different shapes.
    """
    final = checkpoints[-1]
    total, tokens = np.zeros((len(checkpoints), *final.shape[1:-1])), np.zeros(final.shape[1:-1], np.int64)
    for i, ours in enumerate(checkpoints):
        if ours.shape != final.shape:
            raise ValueError(f"checkpoint {i}: expected the final one's {final.shape}, got {ours.shape}; trace the same tokens")
    for piece in pieces(len(final), math.prod(final.shape[1:]) * final.shape[-1]):
        goal = expert_ids(final[piece], n_experts)
        size = (goal < n_experts).sum(axis=-1)
        tokens += (size > 0).sum(axis=0)
        for i, ours in enumerate(checkpoints):
            same = expert_ids(ours[piece], n_experts)[..., :, None] == goal[..., None, :]
            common = (same.any(axis=-2) & (goal < n_experts)).sum(axis=-1)
            total[i] += (common / np.maximum(size, 1)).sum(axis=0)
    return over(total, tokens[None])


class BiasDynamics(NamedTuple):
    """Of the bias b after each step, in units of the score. An update is the difference of two successive steps."""

    mean: Float[np.ndarray, "T *layers"]
    spread: Float[np.ndarray, "T *layers"]  # standard deviation over the experts
    updates: Integer[np.ndarray, "*layers E"]  # that were not 0
    flips: Integer[np.ndarray, "*layers E"]  # updates of the other sign than the last that was not 0; at most updates - 1


def bias_dynamics(bias: Float[np.ndarray, "T *layers E"]) -> BiasDynamics:
    """Mean, spread and sign flips [§2.1.2: b changes by gamma a step]: experts near balance flip often, starved ones never."""
    rows = bias.shape[:-1]
    mean, spread = np.zeros(rows), np.zeros(rows)
    updates, flips, last = (np.zeros(bias.shape[1:], np.int64) for _ in range(3))
    before = np.zeros(bias.shape[1:])
    for step in range(len(bias)):
        now = bias[step].astype(np.float64)
        mean[step], spread[step] = now.mean(axis=-1), now.std(axis=-1)
        if step:
            sign = np.sign(now - before).astype(np.int64)
            updates += sign != 0
            flips += sign * last < 0
            last = np.where(sign != 0, sign, last)
        before = now
    return BiasDynamics(mean, spread, updates, flips)


# --- ranks, nodes, placement ---


class Cluster(NamedTuple):
    """Experts lie on ranks in order, ranks on nodes in order. The report's training: 256, 4 and 8 [§3.2.2]."""

    n_experts: int
    experts_per_rank: int
    ranks_per_node: int


def trace_visits(
    experts_NK: Integer[np.ndarray, "N K"], cluster: Cluster, own_rank_N: Integer[np.ndarray, " N"] | None = None
) -> Visits:
    """`parallel.traffic.visits` of each token that chose an expert, int16. Without `own_rank_N`, token n is on rank n mod P."""
    n_experts, per_rank, node_size = cluster
    if min(cluster) < 1 or n_experts % per_rank:
        raise ValueError(f"cluster: expected {n_experts} experts in whole ranks and nodes of at least one, got {cluster}")
    n_ranks, found = n_experts // per_rank, []
    for piece in pieces(len(experts_NK), experts_NK.shape[1] + n_ranks):
        ids_NK = np.sort(expert_ids(experts_NK[piece], n_experts), axis=1)
        own_N = np.arange(piece.start, piece.start + len(ids_NK)) % n_ranks if own_rank_N is None else own_rank_N[piece]
        size_N = (ids_NK < n_experts).sum(axis=1)
        out = np.zeros((len(Visits._fields), len(ids_NK)), np.int16)
        for k in np.unique(size_N[size_N > 0]):
            out[:, size_N == k] = visits(ids_NK[size_N == k, :k], own_N[size_N == k], n_experts, n_ranks, node_size)
        found.append(out[:, size_N > 0])
    return Visits(*np.concatenate([np.zeros((len(Visits._fields), 0), np.int16), *found], axis=1))


def trace_traffic(
    experts_NK: Integer[np.ndarray, "N K"],
    cluster: Cluster,
    hidden: int,
    own_rank_N: Integer[np.ndarray, " N"] | None = None,
) -> dict[str, Any]:
    """Ranks and nodes a token, and the bytes that its dispatch costs (`parallel.traffic.summary`): across nodes a copy for each
    expert (rows) or for each node (deduplicated). Raises ValueError if no token chose an expert.
    """
    visited = trace_visits(experts_NK, cluster, own_rank_N)
    if not len(visited.nodes):
        raise ValueError("experts: expected a token that chose an expert, got none; trace some text")
    return summary(visited, hidden)


def group_limit_traffic(
    limited_NK: Integer[np.ndarray, "N K"],
    free_NK: Integer[np.ndarray, "M K"],
    cluster: Cluster,
    hidden: int,
) -> dict[str, Any]:
    """`trace_traffic` with the group limit and without it, each from its own trace, and free / limited bytes across nodes.

    A trace does not say what its model would have chosen without the limit: trace it with topk_group = n_group too, or compare
    models that were trained so. The ratios are None where the limited routing crosses no node.
    """
    limited, free = (trace_traffic(experts, cluster, hidden) for experts in (limited_NK, free_NK))
    ratios = {}
    for way in ("rows", "deduplicated"):
        base, other = (found[f"bytes_per_token_{way}"]["across_bf16"] for found in (limited, free))
        ratios[f"{way}_across_ratio"] = other / base if base else None
    return {"limited": limited, "free": free, **ratios}


class PlacedLoad(NamedTuple):
    """Load of the fullest device over the mean: 1 is balance, P one device for all."""

    before: Float[np.ndarray, " L"]  # each expert once, in order
    after: Float[np.ndarray, " L"]


def placed_load(
    load_LE: Integer[np.ndarray, "L E"],
    *,
    num_replicas: int,
    num_gpus: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    planned_for: Integer[np.ndarray, "L E"] | None = None,
) -> PlacedLoad:
    """Before and after `inference.placement.place_experts` [§3.4.1]. Give the load of other text as `planned_for` to see what a
    placement is worth on text that it was not made for; without it the planner knows the load that it is judged by.
    """
    planned_LE = load_LE if planned_for is None else planned_for
    sizes = {"num_replicas": num_replicas, "num_gpus": num_gpus, "num_groups": num_groups, "num_nodes": num_nodes}
    loads = device_loads(load_LE, place_experts(planned_LE, **sizes), num_gpus)
    return PlacedLoad(fullest_over_mean(loads.before), fullest_over_mean(loads.after))
