"""Specialisation of experts [§4.5.3, appendix C] by domain or token id, and which go together, beside what chance would do.

A load that differs between domains is no specialisation yet: with E experts and M labels some always differ. Chance is the
distribution under permutation: labels change places between tokens or, where all tokens of a document have the same, between
whole documents, because one document's tokens choose alike and are not as many independent witnesses.

Experts are as in `analysis.routing`. Labels and documents are any integers; N of each are in memory, and tables of labels that
occur times experts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from scipy import sparse, stats
from scipy.special import xlogy

from dsv3_jax.analysis.routing import expert_ids, over, pieces

ROUNDING = 1e-12  # relative: a statistic that chance equals is no larger than chance


# --- labels ---


class LabelLoad(NamedTuple):
    load_ME: Integer[
        np.ndarray, "M E"
    ]  # tokens of the label that chose the expert; its `relative_load` is the report's figure 9
    tokens_M: Integer[np.ndarray, " M"]  # tokens of the label that chose any; load / tokens is OLMoE's (arXiv 2409.02060, §5.3)


def label_load(
    experts_NK: Integer[np.ndarray, "N K"], labels_N: Integer[np.ndarray, " N"], n_experts: int, n_labels: int
) -> LabelLoad:
    """The load by label; labels are 0 to M - 1. Raises ValueError for others."""
    side = n_experts + 1
    load, tokens_M = np.zeros(n_labels * side, np.int64), np.zeros(n_labels, np.int64)
    for piece in pieces(len(experts_NK), experts_NK.shape[1], len(load)):
        ids_NK, part_N = expert_ids(experts_NK[piece], n_experts), labels_N[piece].astype(np.int64)
        if not 0 <= part_N.min() <= part_N.max() < n_labels:
            raise ValueError(f"labels: expected 0 to {n_labels - 1}, got {part_N.min()} to {part_N.max()}; number them")
        load += np.bincount((part_N[:, None] * side + ids_NK).ravel(), minlength=len(load))
        tokens_M += np.bincount(part_N[(ids_NK < n_experts).any(axis=1)], minlength=n_labels)
    return LabelLoad(load.reshape(n_labels, side)[:, :n_experts], tokens_M)


def label_lift(found: LabelLoad) -> Float[np.ndarray, "M E"]:
    """Share of an expert's load that is of a label over the label's share of tokens: 1 is no preference, NaN without tokens."""
    load_ME, tokens_M = found
    return over(load_ME, load_ME.sum(axis=0, keepdims=True) * (tokens_M / max(1, tokens_M.sum()))[:, None])


def mutual_information(load_ME: Integer[np.ndarray, "M E"]) -> float:
    """Bits that an expert says of the label: sum p(m, e) log2(p(m, e) / p(m) p(e)) over all choices. 0 without a choice.

    Biased upwards by some (M - 1)(E - 1) / 2 N ln 2, as any table of counts: compare with `information_test`'s null.
    """
    counts = load_ME.astype(np.float64)
    total = counts.sum()
    if not total:
        return 0.0
    parts = [xlogy(x, x / total).sum() for x in (counts, counts.sum(axis=0), counts.sum(axis=1))]
    return max(0.0, float((parts[0] - parts[1] - parts[2]) / total / math.log(2)))


class Information(NamedTuple):
    """Mutual information between expert and label beside its distribution under permutation of the labels."""

    bits: float
    null_mean: float  # bits - null_mean is free of the bias
    null_quantiles: Float[np.ndarray, " levels"]
    p_value: float  # (1 + permutations that reach `bits`) / (1 + permutations)


def information_test(
    experts_NK: Integer[np.ndarray, "N K"],
    labels_N: Integer[np.ndarray, " N"],
    n_experts: int,
    *,
    permutations: int,
    rng: np.random.Generator,
    documents_N: Integer[np.ndarray, " N"] | None = None,
    levels: Sequence[float] = (0.025, 0.5, 0.975),
) -> Information:
    """Whether the choice of experts depends on the label. Give `documents_N` for labels of documents, such as domains.

    Raises ValueError without a permutation, and where a document has several labels.
    """
    values, numbers_N = np.unique(labels_N, return_inverse=True)
    bits = mutual_information(label_load(experts_NK, numbers_N, n_experts, len(values)).load_ME)
    null = np.array(
        [
            mutual_information(found.load_ME)
            for found in _permuted(experts_NK, numbers_N, n_experts, len(values), permutations, rng, documents_N)
        ]
    )
    reached = np.count_nonzero(null >= bits - ROUNDING * max(1.0, bits))
    return Information(bits, float(null.mean()), np.quantile(null, levels), (1 + reached) / (1 + permutations))


class Specialist(NamedTuple):
    expert: int
    label: int
    tokens: int  # of the label that chose the expert
    lift: float  # `label_lift`
    p_value: float  # of chance giving this label as large a share of the expert's load
    adjusted: float  # p value after Benjamini and Hochberg: of a list cut here, this share is false in expectation


def specialists(
    experts_NK: Integer[np.ndarray, "N K"],
    labels_N: Integer[np.ndarray, " N"],
    n_experts: int,
    *,
    level: float = 0.05,
    least_lift: float = 1.0,
    documents_N: Integer[np.ndarray, " N"] | None = None,
    permutations: int | None = None,
    rng: np.random.Generator | None = None,
) -> list[Specialist]:
    """Experts that prefer a label by more than chance, surest first: false discovery rate `level` over pairs (label, expert).

    Without documents the p value is exact: under permutation over tokens a pair's count is hypergeometric. That suits labels of
    tokens, such as their ids. Labels of documents, such as domains, need `documents_N` and `rng`, else an author's habit passes
    for a domain's. By default there are as many permutations, M E / level, as let a single pair survive among all; fewer find
    less and stay valid. `least_lift` leaves out what is sure and small, as almost anything is with millions of tokens.

    Raises ValueError for documents without a generator or a permutation, and where a document has several labels.
    """
    values, numbers_N = np.unique(labels_N, return_inverse=True)
    found = label_load(experts_NK, numbers_N, n_experts, len(values))
    if not found.load_ME.any():
        return []
    if documents_N is None:
        p_ME = _exact_p(found)
    elif rng is None:
        raise ValueError(
            "rng: expected a generator to permute the documents' labels, got None; give np.random.default_rng(seed)"
        )
    else:
        n = math.ceil(found.load_ME.size / level) if permutations is None else permutations
        reached_ME = np.zeros(found.load_ME.shape, np.int64)
        share_ME = _share(found) * (1 - ROUNDING)
        for chance in _permuted(experts_NK, numbers_N, n_experts, len(values), n, rng, documents_N):
            reached_ME += _share(chance) >= share_ME
        p_ME = (1 + reached_ME) / (1 + n)
    adjusted_ME = stats.false_discovery_control(p_ME.ravel(), method="bh").reshape(p_ME.shape)
    lift_ME = label_lift(found)
    # A pair without a token is never one: its p value is 1.
    listed = [
        Specialist(
            int(e), int(values[m]), int(found.load_ME[m, e]), float(lift_ME[m, e]), float(p_ME[m, e]), float(adjusted_ME[m, e])
        )
        for m, e in np.argwhere((adjusted_ME <= level) & (lift_ME >= least_lift))
    ]
    return sorted(listed, key=lambda s: (s.adjusted, -s.lift, s.expert, s.label))


def _exact_p(found: LabelLoad) -> np.ndarray:
    """P(as many of the label's tokens or more among an expert's), 1 where there is no preference to test."""
    load_ME, tokens_M = found
    p_ME = np.ones(load_ME.shape)
    # Of a table of token ids most do not, and could not be listed at any sensible level: no need to compute them.
    prefers = np.nan_to_num(label_lift(found)) > 1
    label, expert = np.nonzero(prefers)
    load_E = load_ME.sum(axis=0)
    p_ME[prefers] = stats.hypergeom.sf(load_ME[prefers] - 1, tokens_M.sum(), tokens_M[label], load_E[expert])
    return p_ME


def _share(found: LabelLoad) -> np.ndarray:
    """Of a label's tokens, those that chose the expert. Counts would depend on where long documents go; these hardly do."""
    return found.load_ME / np.maximum(1, found.tokens_M)[:, None]


def _permuted(
    experts_NK: np.ndarray,
    labels_N: np.ndarray,
    n_experts: int,
    n_labels: int,
    permutations: int,
    rng: np.random.Generator,
    documents_N: np.ndarray | None,
) -> Iterator[LabelLoad]:
    """`label_load` under permutations of the labels over the tokens or documents that chose an expert."""
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, got {permutations}; 199 say whether p < 0.01")
    if documents_N is None:
        chose_N = np.zeros(len(experts_NK), bool)
        for piece in pieces(len(experts_NK), experts_NK.shape[1]):
            chose_N[piece] = (expert_ids(experts_NK[piece], n_experts) < n_experts).any(axis=1)
        for _ in range(permutations):
            moved_N = labels_N.copy()
            moved_N[chose_N] = rng.permutation(labels_N[chose_N])
            yield label_load(experts_NK, moved_N, n_experts, n_labels)
        return
    names, document_N = np.unique(documents_N, return_inverse=True)
    label_of = np.zeros(len(names), np.int64)
    label_of[document_N] = labels_N
    if (label_of[document_N] != labels_N).any():
        raise ValueError(
            "documents: expected one label a document, got several in some; leave documents out for labels of tokens"
        )
    load_of, tokens_of = label_load(experts_NK, document_N, n_experts, len(names))
    load_of, tokens_of, label_of = (x[tokens_of > 0] for x in (load_of, tokens_of, label_of))
    for _ in range(permutations):
        moved = rng.permutation(label_of)
        gather = sparse.csr_array((np.ones(len(moved), np.int64), (moved, np.arange(len(moved)))), (n_labels, len(moved)))
        tokens_M = np.bincount(moved, tokens_of, minlength=n_labels).astype(np.int64)
        yield LabelLoad(gather @ load_of, tokens_M)


# --- pairs of experts ---


class Pairs(NamedTuple):
    """Of two experts: [E, E] within a layer, [L - 1, E, E] from a layer (first axis of the two) to the next."""

    counts: Integer[np.ndarray, "*between E E"]
    expected: Float[np.ndarray, "*between E E"]  # counts if choices were independent
    lift: Float[np.ndarray, "*between E E"]  # counts / expected; NaN where none are expected, as with an expert never chosen


def coactivation(experts_NK: Integer[np.ndarray, "N K"], n_experts: int) -> Pairs:
    """How many tokens chose both experts; on the diagonal the load: counts / it is OLMoE's measure (arXiv 2409.02060, §5.2).

    Expected: tokens choose as many distinct experts as they did, all such sets having probability proportional to a product of
    weights, one an expert, that make expected loads the observed ones. Of all distributions of sets with these loads it is the
    one of the largest entropy (conditional Bernoulli sampling: Chen, Dempster and Liu, Biometrika 81, 1994). The product of the
    loads over N would be too much: of K distinct experts, one leaves fewer places to others. The lift of the diagonal is NaN.
    """
    counts_EE, chosen_K = np.zeros((n_experts, n_experts), np.int64), np.zeros(experts_NK.shape[1] + 1, np.int64)
    for piece in pieces(len(experts_NK), experts_NK.shape[1] ** 2, (n_experts + 1) ** 2):
        ids_NK = expert_ids(experts_NK[piece], n_experts)
        counts_EE += _pair_counts(ids_NK, ids_NK, n_experts)
        chosen_K += np.bincount((ids_NK < n_experts).sum(axis=1), minlength=len(chosen_K))
    expected_EE = _expected_pairs(np.diagonal(counts_EE), chosen_K)
    lift_EE = over(counts_EE, expected_EE)
    np.fill_diagonal(lift_EE, np.nan)
    return Pairs(counts_EE, expected_EE, lift_EE)


def transitions(experts_NLK: Integer[np.ndarray, "N L K"], n_experts: int) -> Pairs:
    """How often a token chose expert i in a layer and j in the next, over all K * K pairs of its choices there.

    Expected: the product of the pairs' marginals over their number: choosing in a layer without regard to the one below.
    """
    n, n_layers, top_k = experts_NLK.shape
    counts = np.zeros((max(0, n_layers - 1), n_experts, n_experts), np.int64)
    for piece in pieces(n, n_layers * top_k + top_k**2, (n_experts + 1) ** 2):
        ids_NLK = expert_ids(experts_NLK[piece], n_experts)
        for i, total_EE in enumerate(counts):
            total_EE += _pair_counts(ids_NLK[:, i], ids_NLK[:, i + 1], n_experts)
    from_, to = counts.sum(axis=2, keepdims=True).astype(np.float64), counts.sum(axis=1, keepdims=True)
    pairs = counts.sum(axis=(1, 2), keepdims=True)
    expected = np.divide(from_ * to, pairs, out=np.zeros(counts.shape), where=pairs > 0)
    return Pairs(counts, expected, over(counts, expected))


def _pair_counts(a_NK: np.ndarray, b_NK: np.ndarray, n_experts: int) -> np.ndarray:
    side = n_experts + 1
    pairs = a_NK[:, :, None] * side + b_NK[:, None, :]
    return np.bincount(pairs.ravel(), minlength=side**2).reshape(side, side)[:n_experts, :n_experts]


def _expected_pairs(load_E: np.ndarray, tokens_of_size: np.ndarray) -> np.ndarray:
    """[E, E]. Sets of k experts are E independent events, conditioned on k of them happening: q are their probabilities."""
    sizes = [k for k in range(1, len(tokens_of_size)) if tokens_of_size[k]]
    if not sizes:
        return np.zeros((len(load_E), len(load_E)))
    tokens = sum(int(tokens_of_size[k]) for k in sizes)
    goal_E = load_E / tokens
    q_E, free_E = goal_E.copy(), (goal_E > 0) & (goal_E < 1)
    for _ in range(1000):
        others = _happening_without_each(q_E, sizes[-1])
        happening = (1 - q_E[0]) * others[0]
        happening[1:] += q_E[0] * others[0, :-1]
        now_E = sum(tokens_of_size[k] / happening[k] * q_E * others[:, k - 1] for k in sizes) / tokens
        if np.abs(now_E - goal_E).max() < 1e-12:
            break
        # Half a step of the odds: a whole one goes too far where the conditioning ties experts together (E = 2, k = 1: by 2).
        now_E = np.clip(now_E, 1e-300, 1 - 1e-16)
        odds_E = np.divide(q_E, 1 - q_E, out=np.ones_like(q_E), where=free_E)
        ratio_E = np.divide(goal_E * (1 - now_E), now_E * (1 - goal_E), out=np.ones_like(q_E), where=free_E)
        odds_E *= np.sqrt(ratio_E)
        q_E = np.where(free_E, odds_E / (1 + odds_E), goal_E)
    # Row i: without expert i, and then without each other one.
    without_EE = np.where(np.eye(len(q_E), dtype=bool), 0.0, q_E[None, :])
    both = _happening_without_each(without_EE, sizes[-1])
    pairs_EE = sum((tokens_of_size[k] / happening[k] * both[..., k - 2] for k in sizes if k > 1), np.zeros_like(without_EE))
    pairs_EE *= q_E[:, None] * q_E[None, :]
    np.fill_diagonal(pairs_EE, load_E)
    return pairs_EE


def _happening_without_each(q: np.ndarray, most: int) -> np.ndarray:
    """[..., E] -> [..., E, most + 1]: the probability that k of the other events happen. Only sums of products: none cancel."""
    n = q.shape[-1]

    def running(order: range) -> np.ndarray:
        out = np.zeros((n, *q.shape[:-1], most + 1))
        now = np.zeros((*q.shape[:-1], most + 1))
        now[..., 0] = 1
        for i in order:
            out[i] = now
            chance = q[..., i, None]
            shifted = now[..., :-1] * chance
            now = now * (1 - chance)
            now[..., 1:] += shifted
        return out

    before, after = running(range(n)), running(range(n - 1, -1, -1))
    out = np.zeros_like(before)
    for k in range(most + 1):
        out[..., k] = (before[..., : k + 1] * after[..., k::-1]).sum(axis=-1)
    return np.moveaxis(out, 0, -2)
