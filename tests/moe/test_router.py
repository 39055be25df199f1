"""Affinities, node-limited choice and gates against the known vectors and the float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.moe.router import gates, group_limited, one_hot, route
from oracles import checks_router, numpy_moe, vectors
from oracles.numpy_layers import numerical_gradient


def test_known_experts_and_gates_are_chosen_and_ties_go_to_the_lower_index():
    checks_router.check_known_choices()


def test_masked_groups_are_never_chosen_when_scores_are_negative():
    checks_router.check_negative_scores_of_kept_groups()


@pytest.mark.parametrize("name", checks_router.SETTINGS)
def test_random_choices_gates_and_margins_equal_the_float64_reference(name):
    checks_router.check_random_choices(name)


def test_bias_stays_out_of_the_gates_to_the_last_bit():
    checks_router.check_gates_are_free_of_the_bias()


def test_router_computes_in_float32_on_bfloat16_tokens():
    checks_router.check_router_computes_in_float32()


@settings(max_examples=25)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5]), min_size=12, max_size=12), st.integers(1, 3))
def test_ties_go_to_the_lower_index_in_groups_and_experts(logits, kept):
    """Four values for twelve experts: ties everywhere, between experts and between groups."""
    setting = dict(num_experts_per_tok=3, n_group=3, topk_group=kept, group_score_topk=2)
    config = checks_router.router_config(12, setting)
    # Scores as the reference sees them are compared in float64; equal logits are equal scores in both.
    expected = numpy_moe.route_token(np.array(logits), np.zeros(12), **setting)
    x, weight = jnp.asarray([logits], jnp.float32), jnp.eye(12, dtype=jnp.float32)
    actual = jitted_route(config)(x, weight, jnp.zeros(12))
    ambiguous = 0 < expected["group_margin"] < 1e-6  # sums of equal pairs in another order
    if not ambiguous:
        assert actual.indices[0].tolist() == expected["indices"].tolist()


def jitted_route(config, compiled={}):  # noqa: B006 - the cache is the point
    if config not in compiled:
        compiled[config] = jax.jit(lambda x, weight, bias: route(x, weight, bias, config))
    return compiled[config]


def test_dropped_groups_are_minus_infinity_and_kept_ones_untouched():
    config = checks_router.router_config(8, vectors.FILL_SETTINGS)
    biased = jnp.asarray([[-0.1, -0.2, -0.9, -0.9, -0.8, -0.8, -0.8, -0.8]], jnp.float32)
    eligible = np.asarray(group_limited(biased, config))[0]
    np.testing.assert_array_equal(eligible[:4], biased[0, :4])
    assert (eligible[4:] == -np.inf).all()


def test_margin_is_infinite_where_nothing_is_left_out():
    config = checks_router.router_config(8, vectors.FILL_SETTINGS | {"num_experts_per_tok": 4})
    routing = checks_router.run_router(vectors.FILL_LOGITS[None, :], vectors.FILL_BIAS, config)
    assert np.isposinf(routing.margin).all()  # four of the four experts of the kept group


def test_gradient_flows_through_the_scores_of_chosen_experts_alone_and_never_into_the_bias():
    config = checks_router.router_config(8, dict(num_experts_per_tok=3))
    logits = jnp.asarray(vectors.FILL_LOGITS[None, :], jnp.float32)
    weight = jnp.eye(8, dtype=jnp.float32)

    def first_gate(logits, bias):
        return route(logits, weight, bias, config).gates[0, 0]

    d_logits, d_bias = jax.grad(first_gate, argnums=(0, 1))(logits, jnp.zeros(8))
    chosen = set(route(logits, weight, jnp.zeros(8), config).indices[0].tolist())
    assert set(np.flatnonzero(d_logits[0])) == chosen
    np.testing.assert_array_equal(d_bias, np.zeros(8))


def test_gate_gradient_is_the_slope_of_the_reference():
    config = checks_router.router_config(8, dict(num_experts_per_tok=3, routed_scaling_factor=2.5))
    weights = np.array([0.3, -1.0, 2.0])
    indices = jnp.asarray([[0, 4, 1]], jnp.int32)

    def ours(logits):
        return (gates(jax.nn.sigmoid(logits), indices, config)[0] * jnp.asarray(weights, jnp.float32)).sum()

    def reference(logits):
        routing = numpy_moe.route_token(logits, np.zeros(8), num_experts_per_tok=3, routed_scaling_factor=2.5)
        return float(routing["gates"] @ weights)

    actual = jax.grad(ours)(jnp.asarray(vectors.FILL_LOGITS[None, :], jnp.float32))[0]
    np.testing.assert_allclose(actual, numerical_gradient(reference, vectors.FILL_LOGITS), rtol=0, atol=1e-6)


def test_one_hot_marks_each_choice():
    marks = one_hot(jnp.asarray([[2, 0]], jnp.int32), 3)
    np.testing.assert_array_equal(marks, [[[False, False, True], [True, False, False]]])
