"""Routing measures against loops over tokens, and against values that follow from their definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.analysis import routing
from dsv3_jax.analysis.routing import (
    Cluster,
    batch_loads,
    bias_dynamics,
    coefficient_of_variation,
    dead_experts,
    expert_load,
    gate_entropy,
    gini,
    group_limit_traffic,
    load_entropy,
    margins,
    placed_load,
    rank_load,
    saturation,
    trace_traffic,
    trace_visits,
    violation,
)


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """Several pieces in every test, with a ragged last one."""
    before, routing.PIECE = routing.PIECE, 50
    yield
    routing.PIECE = before


@st.composite
def traces(draw, most_layers=3):
    """(experts [N, L, K], n_experts): distinct experts in any order, some replaced by ids of none; any width."""
    n_experts, n_tokens, n_layers = draw(st.integers(1, 6)), draw(st.integers(0, 40)), draw(st.integers(1, most_layers))
    top_k, rng = draw(st.integers(1, n_experts)), np.random.default_rng(draw(st.integers(0, 10**6)))
    experts = np.argsort(rng.random((n_tokens, n_layers, n_experts)), axis=-1)[..., :top_k]
    none = rng.random(experts.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    experts[none] = rng.choice([n_experts, n_experts + 3], none.sum())
    return experts.astype(draw(st.sampled_from([np.uint8, np.int16, np.uint32, np.int64]))), n_experts


def choices(experts, n_experts):
    """Of each token the ids that are experts."""
    return [[int(e) for e in token if e < n_experts] for token in experts]


# --- load and balance ---


@given(traces())
def test_load_counts_every_choice_of_an_expert(case):
    experts, n_experts = case
    load = expert_load(experts, n_experts)
    for layer in range(experts.shape[1]):
        flat = list(itertools.chain(*choices(experts[:, layer], n_experts)))
        assert load[layer].tolist() == [flat.count(e) for e in range(n_experts)]
        assert expert_load(experts[:, layer], n_experts).tolist() == load[layer].tolist()


def test_256_experts_in_a_byte_have_room_for_none_elsewhere_and_negative_ids_are_refused():
    assert expert_load(np.array([[255, 0]], np.uint8), 256)[[0, 255]].tolist() == [1, 1]
    with pytest.raises(ValueError, match="from 0 up, got -1; write 4"):
        expert_load(np.array([[1, -1]]), 4)


@given(traces(), st.integers(1, 15))
def test_violation_by_batch_and_overall(case, batch_tokens):
    experts, n_experts = case
    loads = batch_loads(experts, n_experts, batch_tokens)
    assert len(loads) == len(experts) // batch_tokens
    found = violation(loads)
    for layer in range(experts.shape[1]):
        chosen = choices(experts[:, layer], n_experts)
        batches = [list(itertools.chain(*chosen[i * batch_tokens :][:batch_tokens])) for i in range(len(loads))]
        each = [max(map(b.count, range(n_experts))) * n_experts / len(b) - 1 for b in batches if b]
        everything = list(itertools.chain(*batches))
        np.testing.assert_allclose(found.batch[layer], np.mean(each) if each else np.nan, rtol=1e-12, atol=1e-12)
        most = max(map(everything.count, range(n_experts)))
        overall = most * n_experts / len(everything) - 1 if everything else np.nan
        np.testing.assert_allclose(found.overall[layer], overall, rtol=1e-12, atol=1e-12)
    one_layer = violation(loads[:, 0])
    np.testing.assert_array_equal([one_layer.batch, one_layer.overall], [found.batch[0], found.overall[0]])


def test_a_ranks_violation_is_of_the_sum_over_its_block_of_experts():
    load = np.array([[4, 0, 0, 4, 1, 3]])
    assert rank_load(load, 3).tolist() == [[4, 4, 4]]
    assert violation(rank_load(load, 3)).batch == 0 and violation(load).batch == 1
    assert rank_load(load[0], 2).tolist() == [4, 8]
    with pytest.raises(ValueError, match="divisor of the 6 experts, got 4"):
        rank_load(load, 4)


@pytest.mark.parametrize("n_experts", [1, 2, 7])
def test_measures_of_balance_and_of_one_expert_for_all_are_their_bounds(n_experts):
    load = np.stack([np.full(n_experts, 5), 9 * np.eye(n_experts, dtype=int)[-1], np.zeros(n_experts, int)])
    one = math.sqrt(n_experts - 1)
    np.testing.assert_allclose(coefficient_of_variation(load), [0, one, np.nan], atol=1e-12)
    np.testing.assert_allclose(gini(load), [0, 1 - 1 / n_experts, np.nan], atol=1e-12)
    bits, share = load_entropy(load)
    np.testing.assert_allclose(bits, [math.log2(n_experts), 0, np.nan], atol=1e-12)
    np.testing.assert_allclose(share, [1, 0 if n_experts > 1 else 1, np.nan], atol=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
def test_measures_of_spread_follow_their_formulas(counts):
    load, n, total = np.array(counts), len(counts), sum(counts)
    pairs = sum(abs(a - b) for a in counts for b in counts)
    np.testing.assert_allclose(gini(load), pairs / (2 * n * total), rtol=1e-12, atol=1e-12)
    squares = sum((c - total / n) ** 2 for c in counts) / n
    np.testing.assert_allclose(coefficient_of_variation(load), math.sqrt(squares) / (total / n), rtol=1e-12, atol=1e-12)
    bits = -sum(c / total * math.log2(c / total) for c in counts if c)
    np.testing.assert_allclose(load_entropy(load).bits, bits, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(load_entropy(load).share, bits / math.log2(n) if n > 1 else 1, rtol=1e-12, atol=1e-12)


@given(traces(), st.sampled_from([np.float16, np.float32]))
def test_gate_entropy_is_the_mean_over_tokens_that_have_an_expert(case, dtype):
    experts, n_experts = case
    gates = np.random.default_rng(0).integers(1, 9, experts.shape).astype(dtype)  # of none too: it counts nowhere
    found = gate_entropy(gates, experts, n_experts)
    for layer in range(experts.shape[1]):
        each = []
        for ids, weights in zip(experts[:, layer], gates[:, layer], strict=True):
            kept = [float(g) for e, g in zip(ids, weights, strict=True) if e < n_experts]
            if kept:
                each.append(-sum(g / sum(kept) * math.log2(g / sum(kept)) for g in kept))
        np.testing.assert_allclose(found[layer], np.mean(each) if each else np.nan, rtol=1e-12, atol=1e-12)


def test_the_two_entropies_are_not_one():
    experts, gates = np.array([[0, 1], [2, 3]]), np.array([[1.0, 0.0], [1.0, 0.0]], np.float16)
    assert load_entropy(expert_load(experts, 4)).bits == 2 and gate_entropy(gates, experts, 4) == 0
    assert gate_entropy(np.ones_like(gates), experts, 4) == 1
    assert np.isnan(gate_entropy(np.zeros_like(gates), experts, 4))


def test_dead_experts_have_less_than_a_share_of_the_mean():
    load = np.array([[0, 1, 2, 5], [0, 0, 0, 0]])
    assert dead_experts(load).tolist() == [[True, False, False, False], [True] * 4]
    assert dead_experts(load, 0.5).tolist() == [[True, False, False, False], [True] * 4]  # 1 is half of the mean, not less
    assert dead_experts(load, 0.51).tolist() == [[True, True, False, False], [True] * 4]


# --- margins ---


def test_margins_leave_out_what_is_not_finite_and_count_strictly_below():
    values = np.array([0.5, 0.0, np.inf, 0.25, np.nan, 0.125], np.float16)
    found = margins(values, [0.0, 0.5, 1.0], [0.0, 0.125, 0.2, 1.0])
    assert found.tokens == 4
    assert found.quantiles.tolist() == [0.0, 0.1875, 0.5]
    assert found.near_ties.tolist() == [0.0, 0.25, 0.5, 1.0]
    nothing = margins(values[2:3], [0.5], [0.1, 0.2])
    assert nothing.tokens == 0 and np.isnan(nothing.quantiles).all() and np.isnan(nothing.near_ties).all()


# --- over training ---


@given(traces(), st.integers(0, 10**6))
def test_saturation_is_the_mean_share_of_final_choices_made_before(case, seed):
    final, n_experts = case
    rng = np.random.default_rng(seed)
    ours = np.argsort(rng.random((*final.shape[:2], n_experts)), axis=-1)[..., : final.shape[-1]].astype(final.dtype)
    found = saturation([ours, final], n_experts)
    for layer in range(final.shape[1]):
        pairs = zip(choices(ours[:, layer], n_experts), choices(final[:, layer], n_experts), strict=True)
        each = [len(set(a) & set(b)) / len(b) for a, b in pairs if b]
        np.testing.assert_allclose(found[:, layer], [np.mean(each), 1] if each else [np.nan] * 2, rtol=1e-12)


def test_saturation_refuses_other_tokens_and_does_not_match_none_with_none():
    with pytest.raises(ValueError, match=r"checkpoint 0: expected the final one's \(2, 1\), got \(3, 1\)"):
        saturation([np.zeros((3, 1), int), np.zeros((2, 1), int)], 4)
    assert saturation([np.array([[4, 1]]), np.array([[4, 0]])], 4).tolist() == [0, 1]


def test_bias_dynamics_of_a_known_course():
    up_and_down = [0, 1, 0, 0, 1, 1, 2]  # signs + - 0 + 0 +: two flips in four updates; 0 neither is a flip nor hides one
    bias = np.stack([np.array(up_and_down), np.arange(7)], axis=1).astype(np.float32)
    found = bias_dynamics(bias)
    assert found.updates.tolist() == [4, 6] and found.flips.tolist() == [2, 0]
    np.testing.assert_allclose(found.mean, bias.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.spread, np.abs(bias[:, 0] - bias[:, 1]) / 2, rtol=1e-6)
    layers = bias_dynamics(np.stack([bias, -bias], axis=1))
    assert layers.flips.tolist() == [[2, 0], [2, 0]] and layers.mean.shape == (7, 2)
    assert bias_dynamics(bias[:0]).mean.shape == (0,)


# --- ranks, nodes, placement ---


@given(traces(most_layers=1), st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 4)]), st.booleans())
def test_visits_and_bytes_follow_every_copy(case, sizes, own_given):
    (per_rank, node_size), (experts_NK, n_experts) = sizes, (case[0][:, 0], case[1])
    n_experts += -n_experts % per_rank
    experts_NK = np.where(experts_NK < case[1], experts_NK, n_experts)
    n_ranks = n_experts // per_rank
    own = np.random.default_rng(0).integers(0, n_ranks, len(experts_NK)) if own_given else np.arange(len(experts_NK)) % n_ranks
    expected = []
    for ids, home in zip(choices(experts_NK, n_experts), own, strict=True):
        ranks = [e // per_rank for e in ids]
        nodes = [r // node_size for r in ranks]
        if ids:
            away = [n for n in nodes if n != home // node_size]
            expected.append([len(set(ranks)), len(set(nodes)), len(away), len(set(away))])
    cluster = Cluster(n_experts, per_rank, node_size)
    found = trace_visits(experts_NK, cluster, own if own_given else None)
    actual = np.stack([found.ranks, found.nodes, found.rows_across, found.deduplicated_across], axis=1)
    assert actual.tolist() == expected
    if not expected:
        with pytest.raises(ValueError, match="a token that chose an expert, got none"):
            trace_traffic(experts_NK, cluster, 8)
        return
    traffic, means = trace_traffic(experts_NK, cluster, 8, own if own_given else None), np.mean(expected, axis=0)
    np.testing.assert_allclose([traffic["ranks_mean"], traffic["nodes_mean"]], means[:2], rtol=1e-12)
    # BF16: 2 bytes for each of 8 channels
    np.testing.assert_allclose(traffic["bytes_per_token_rows"]["across_bf16"], 16 * means[2], rtol=1e-12)
    np.testing.assert_allclose(traffic["bytes_per_token_deduplicated"]["across_bf16"], 16 * means[3], rtol=1e-12)


def test_free_routing_costs_what_its_own_trace_says():
    cluster = Cluster(8, 1, 2)  # four nodes of two experts
    limited, free = np.tile([[0, 1, 2, 3]], (8, 1)), np.tile([[0, 2, 4, 6]], (8, 1))
    found = group_limit_traffic(limited, free, cluster, 4)
    assert (found["limited"]["nodes_mean"], found["free"]["nodes_mean"]) == (2, 4)
    # Of 8 tokens, one on each rank: limited to 2 nodes, a node is another one in 3/4 of cases; 4 rows go to 2 or 4 nodes.
    assert found["deduplicated_across_ratio"] == 2 and found["rows_across_ratio"] == 1
    assert group_limit_traffic(limited, free, Cluster(8, 1, 8), 4)["rows_across_ratio"] is None
    with pytest.raises(ValueError, match="cluster: expected 8 experts in whole ranks"):
        trace_traffic(limited, Cluster(8, 3, 1), 4)


def test_a_placement_is_worth_most_for_the_load_that_it_was_made_for():
    load = np.array([[8, 8, 0, 0]])
    assert placed_load(load, num_replicas=4, num_gpus=2) == (2.0, 1.0)
    # Made for another text, the placement puts experts 0 and 1 together and changes nothing.
    assert placed_load(load, num_replicas=4, num_gpus=2, planned_for=np.array([[9, 0, 8, 1]])) == (2.0, 2.0)
