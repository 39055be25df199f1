"""Ranks, nodes and bytes against a loop over tokens; the promise of node-limited routing on the real router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.moe.router import route
from dsv3_jax.parallel.traffic import FORMAT_BYTES, summary, visits
from dsv3_jax.presets import preset
from dsv3_jax.settings import override


def one_token(experts, own, per_rank, node_size):
    """Follow each copy: (ranks, nodes, rows inside, rows across, deduplicated inside, across)."""
    ranks = [e // per_rank for e in experts]
    nodes = {r // node_size for r in ranks}
    home = own // node_size
    rows = [sum(r != own and r // node_size == home for r in ranks), sum(r // node_size != home for r in ranks)]
    inside = across = 0
    for node in nodes:
        targets = {r for r in ranks if r // node_size == node}
        if node == home:
            inside += len(targets - {own})
        else:
            across += 1
            inside += len(targets - {node * node_size + own % node_size})
    return [len(set(ranks)), len(nodes), *rows, inside, across]


@given(st.integers(0, 10**6), st.sampled_from([(8, 4), (8, 8), (4, 2), (2, 8), (16, 4)]), st.integers(1, 4), st.integers(1, 4))
def test_equals_following_every_copy(seed, shape, per_rank, top_k):
    (n_ranks, node_size), rng = shape, np.random.default_rng(seed)
    n_experts = n_ranks * per_rank
    top_k = min(top_k, n_experts)
    indices = np.argsort(rng.random((9, n_experts)), axis=1)[:, :top_k]
    own = rng.integers(0, n_ranks, 9)
    actual = visits(indices, own, n_experts, n_ranks, node_size)
    expected = [one_token(row, home, per_rank, node_size) for row, home in zip(indices.tolist(), own.tolist(), strict=True)]
    np.testing.assert_array_equal(np.stack(actual, axis=1), expected)


@pytest.mark.parametrize("limit, nodes_max", [(4, 4), (2, 2), (8, 8)])
def test_a_token_visits_at_most_as_many_nodes_as_groups_are_kept(limit, nodes_max):
    """256 experts on 64 ranks of 8 nodes, a group to a node, as in the report's training."""
    model = override(preset("deepseek_v3_671b"), {"topk_group": limit, "hidden_size": 32}).model
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((512, 32), (32, 256)))
    indices = np.asarray(jax.jit(lambda x, w: route(x, w, jnp.zeros(256), model).indices)(x, weight))
    visited = visits(indices, np.arange(512) % 64, 256, 64, 8)
    assert visited.nodes.max() <= nodes_max and visited.ranks.max() <= 8
    if limit == 8:
        assert visited.nodes.max() > 4  # without the limit some token goes further: the test above can fail


def test_bytes_are_copies_times_channels_times_the_format():
    indices = np.array([[0, 1, 4, 15]])  # of 16 experts on 8 ranks of 4 a node, from rank 1: ranks 0, 0, 2, 7
    result = summary(visits(indices, np.array([1]), 16, 8, 4), hidden=256)
    assert (result["ranks_max"], result["nodes_max"]) == (3, 2)
    assert result["bytes_per_token_rows"] == {
        "inside_bf16": 3 * 512, "inside_fp8": 3 * (256 + 8), "across_bf16": 512, "across_fp8": 264,
    }  # fmt: skip
    # once to ranks 0 and 2; once to node 1, where it lands on rank 5 and goes on to rank 7
    assert result["bytes_per_token_deduplicated"]["inside_bf16"] == 3 * 512
    assert FORMAT_BYTES["fp8"] == 1 + 4 / 128
    with pytest.raises(ValueError, match="divisor of the 16 experts, got 3"):
        visits(indices, np.array([1]), 16, 3, 4)
