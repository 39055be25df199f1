"""Counts, the bias controller and the balance losses against hand-calculated values and the float64 reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.moe.balance import (
    CONTROLLERS,
    Controller,
    centred_step,
    controller_of,
    count_load,
    max_violation,
    proportional_step,
    sequence_loss,
    sign_step,
)
from dsv3_jax.presets import preset
from oracles import checks_balance, numpy_moe
from oracles.numpy_layers import numerical_gradient, sigmoid, softmax


def with_train(**changes):
    config = preset("tiny")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_counts_loss_bias_step_and_max_violation_are_the_hand_calculated_ones():
    checks_balance.check_known_balance()


def test_padding_is_not_counted():
    checks_balance.check_counts_leave_padding_out()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_three_losses_equal_the_reference_on_ragged_sequences(seed):
    checks_balance.check_losses_equal_the_reference(seed)


def test_sign_is_exact_where_float32_counts_are_not():
    checks_balance.check_sign_is_exact_at_large_counts()


def test_bias_keeps_steps_that_bfloat16_would_lose():
    checks_balance.check_bias_keeps_small_steps()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**28 - 1), min_size=8, max_size=8), st.booleans())
def test_bias_moves_against_the_load_error_by_exactly_the_speed(load, even):
    loads = np.full(8, load[0]) if even else np.array(load)
    moved = sign_step(jnp.zeros(8), jnp.asarray(loads, jnp.int32), jnp.float32(2**-10))
    np.testing.assert_array_equal(moved, numpy_moe.sign_bias_update(np.zeros(8), loads, 2**-10))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
def test_max_violation_is_the_largest_load_over_the_mean_minus_one(load):
    actual = float(max_violation(jnp.asarray(load, jnp.int32)))
    assert actual == pytest.approx(numpy_moe.max_violation(np.array(load)), rel=1e-5, abs=1e-6)


def test_max_violation_is_zero_where_nothing_was_routed_and_taken_layer_by_layer():
    load = jnp.asarray([[0, 0, 0], [1, 1, 1], [3, 0, 0]], jnp.int32)
    np.testing.assert_allclose(max_violation(load), [0.0, 0.0, 2.0], atol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_counts_equal_the_loop_over_tokens(seed):
    rng = np.random.default_rng(seed)
    indices = np.argsort(rng.random((2, 5, 6)), axis=-1)[:, :, :3].astype(np.int32)
    valid = rng.random((2, 5)) < 0.5
    counts = count_load(jnp.asarray(indices), jnp.asarray(valid), 6)
    np.testing.assert_array_equal(counts, numpy_moe.expert_counts(indices, 6, valid))


@pytest.mark.parametrize("name", checks_balance.LOSSES)
def test_loss_gradient_is_the_slope_of_the_reference_with_the_load_held_fixed(name):
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((2, 3, 4))
    indices = np.argsort(-logits, axis=-1)[:, :, :2]
    valid = np.array([[True, True, False], [True, True, True]])
    load, config = numpy_moe.expert_counts(indices, 4, valid), checks_balance.balance_config(4, 2)

    def reference(logits):
        if name == "classical":
            return numpy_moe.classical_loss(logits, indices, valid)
        loss = {"sequence": numpy_moe.sequence_wise_loss, "batch": numpy_moe.batch_wise_loss}[name]
        return loss(sigmoid(logits), indices, valid)

    def ours(logits):
        routing = checks_balance.routing_of(logits, indices)
        return CONTROLLERS[name]().loss(routing, checks_balance.scope_of(valid, load), config)

    actual = jax.grad(ours)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(actual, numerical_gradient(reference, logits), rtol=0, atol=1e-6)


def test_unbiased_counting_takes_the_top_k_of_the_scores_instead_of_what_was_chosen():
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((1, 5, 6)).astype(np.float32)
    chosen = np.argsort(logits, axis=-1)[:, :, :2]  # a bias so strong that the worst are chosen
    best = np.argsort(-logits, axis=-1)[:, :, :2]
    valid, scores = np.ones((1, 5), bool), sigmoid(logits.astype(np.float64))
    for topk, counted in (("selected", chosen), ("unbiased", best)):
        config = checks_balance.balance_config(6, 2, aux_loss_topk=topk)
        loss = float(sequence_loss(checks_balance.routing_of(logits, chosen), checks_balance.scope_of(valid), config))
        assert loss == pytest.approx(numpy_moe.sequence_wise_loss(scores, counted, valid), abs=2e-6)


def test_classical_probabilities_are_a_softmax_and_the_report_s_are_normalised_affinities():
    rng = np.random.default_rng(7)
    logits = 3 * rng.standard_normal((1, 4, 5)).astype(np.float32)
    indices, valid = np.argsort(-logits, axis=-1)[:, :, :2], np.ones((1, 4), bool)
    f = 5 / (2 * 4) * numpy_moe.expert_counts(indices, 5, valid)
    affinities = sigmoid(logits.astype(np.float64))
    expected = {"batch": affinities / affinities.sum(-1, keepdims=True), "classical": softmax(logits.astype(np.float64))}
    scope = checks_balance.scope_of(valid, numpy_moe.expert_counts(indices, 5, valid))
    for name, p in expected.items():
        loss = CONTROLLERS[name]().loss(checks_balance.routing_of(logits, indices), scope, checks_balance.balance_config(5, 2))
        assert float(loss) == pytest.approx(float((f * p.mean(axis=(0, 1))).sum()), abs=2e-6)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=9), st.integers(0, 2**32 - 1))
def test_other_steps_are_the_relative_load_error_and_the_sign_without_drift(load, seed):
    bias, loads, speed = np.random.default_rng(seed).normal(size=len(load)), np.array(load), 2**-6
    arguments = jnp.asarray(bias, jnp.float32), jnp.asarray(loads, jnp.int32), jnp.float32(speed)
    error = 1 - loads / loads.mean() if loads.any() else np.zeros(len(loads))
    # float32: the quotient and the sum are each rounded once, at magnitudes of at most 9 and some 5
    np.testing.assert_allclose(proportional_step(*arguments), bias + speed * error, atol=2e-6)
    moved = numpy_moe.sign_bias_update(bias, loads, speed)
    np.testing.assert_allclose(centred_step(*arguments), moved - moved.mean(), atol=2e-6)


def test_controllers_are_what_the_field_says():
    expected = {**dict.fromkeys(("sign", "proportional", "centred"), (True, True, 1e-4, False)),
                "sequence": (False, True, 1e-3, False), "batch": (False, True, 1e-3, True),
                "classical": (False, True, 1e-3, True), "none": (False, False, 0.0, False)}  # fmt: skip
    for name, (moves, has_loss, alpha, needs_load) in expected.items():
        controller = controller_of(with_train(controller=name))
        assert (controller.move_bias is not None, controller.loss is not None) == (moves, has_loss), name
        assert (controller.alpha, controller.needs_load) == (alpha, needs_load), name


def test_alpha_is_the_configured_one_and_a_loss_of_weight_zero_is_dropped():
    assert controller_of(with_train(controller="batch", aux_loss_alpha=0.02)).alpha == 0.02
    dropped = controller_of(with_train(controller="sign", aux_loss_alpha=0.0))
    assert dropped.loss is None and dropped.move_bias is sign_step and isinstance(dropped, Controller)
    assert not controller_of(with_train(controller="batch", aux_loss_alpha=0.0)).needs_load
