"""One training step: the bias moves once, accumulation and a non-finite loss change nothing, evaluation counts."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.module import abstract_variables
from dsv3_jax.moe.balance import controller_of
from dsv3_jax.presets import preset
from dsv3_jax.training.optimizer import init_optimizer
from dsv3_jax.training.step import (
    Hyper,
    TrainState,
    gradients,
    init_state,
    make_eval_step,
    make_train_step,
    move_bias,
    train_step,
)
from oracles import checks_step, numpy_model
from oracles.checks_step import DOMAINS, HYPER, PLAIN, RELEASED, cut, rows, state_of, step_config
from oracles.compiling import quick_jit
from oracles.jaxprs import arrays, equations
from oracles.numpy_objective import objective
from oracles.random_checkpoint import random_tensors


@cache
def plain_step():
    """The step of the smallest model, in two micro-batches, compiled once for the tests below."""
    config = step_config(PLAIN)
    run = partial(train_step, config=config, controller=controller_of(config), n_domains=DOMAINS)
    return config, quick_jit(run)


def test_bias_moves_once_a_step_by_exactly_the_speed():
    checks_step.check_bias_moves_once_a_step_by_the_speed()


def test_rematerialisation_changes_no_count_and_no_loss():
    checks_step.check_rematerialisation_changes_no_count_and_no_loss()


@pytest.mark.parametrize("where", ["params", "bias"])
def test_a_non_finite_loss_changes_nothing_but_the_counters(where):
    config, run = plain_step()
    state = state_of(random_tensors(PLAIN, seed=1), config)
    if where == "params":
        state = state._replace(params=state.params | {"lm_head": state.params["lm_head"].at[3, 0].set(jnp.inf)})
    else:
        state = state._replace(params=state.params | {"norm": state.params["norm"].at[0].set(jnp.nan)})
    new, metrics = run(state, cut(rows(), 2), HYPER)
    assert bool(metrics["nonfinite"])
    for old, kept in zip(jax.tree.leaves(state[:3]), jax.tree.leaves(new[:3]), strict=True):
        np.testing.assert_array_equal(old, kept)
    assert [int(new.step), int(new.skipped_in_row), int(new.skipped_total)] == [1, 1, 1]
    again, _ = run(new, cut(rows(), 2), HYPER)
    assert [int(again.step), int(again.skipped_in_row), int(again.skipped_total)] == [2, 2, 2]
    healed, _ = run(again._replace(params=state_of(random_tensors(PLAIN, seed=1), config).params), cut(rows(), 2), HYPER)
    assert [int(healed.step), int(healed.skipped_in_row), int(healed.skipped_total)] == [3, 0, 2]


def test_a_step_without_a_single_target_is_finite_and_leaves_the_weights_to_decay():
    config, run = plain_step()
    state = state_of(random_tensors(PLAIN, seed=1), config)
    empty = {name: jnp.zeros_like(a) for name, a in cut(rows(), 2).items()}
    new, metrics = run(state, empty, HYPER)
    assert not bool(metrics["nonfinite"]) and float(metrics["loss"]) == 0.0 == float(metrics["grad_norm"])
    assert int(metrics["load"].sum()) == 0 and int(metrics["tokens"]) == 0
    np.testing.assert_array_equal(new.bias, state.bias)


def test_metrics_say_what_the_reference_says():
    config, run = plain_step()
    tensors, batch = random_tensors(PLAIN, seed=1), rows()
    _, metrics = run(state_of(tensors, config), cut(batch, 2), HYPER)
    expected = objective(tensors, PLAIN, batch, mtp_weight=0.7, alpha=0.05, n_domains=DOMAINS)
    for name in ("loss", "main_loss", "balance_loss"):
        assert float(metrics[name]) == pytest.approx(expected[name], rel=1e-5), name
    assert float(metrics["mtp_loss"]) == 0.0 and int(metrics["tokens"]) == sum(expected["domain_tokens"]) == 16
    load = expected["load"][0]
    np.testing.assert_array_equal(metrics["dead_experts"], [(load == 0).sum()])
    assert float(metrics["max_vio"][0]) == pytest.approx(load.max() / load.mean() - 1, rel=1e-6)


def test_bias_of_mtp_layers_moves_only_if_they_are_balanced():
    config = step_config(RELEASED)
    bias, load = jnp.zeros((2, 8)), jnp.asarray([[4, 0] * 4, [0, 4] * 4], jnp.int32)
    moved = {
        flag: move_bias(bias, load, jnp.float32(0.5), checks_step.with_train(config, balance_mtp=flag), controller_of(config))
        for flag in (True, False)
    }
    np.testing.assert_array_equal(moved[True], [[-0.5, 0.5] * 4, [0.5, -0.5] * 4])
    np.testing.assert_array_equal(moved[False], [[-0.5, 0.5] * 4, [0.0] * 8])
    none = checks_step.with_train(config, controller="none")
    np.testing.assert_array_equal(move_bias(bias, load, jnp.float32(0.5), none, controller_of(none)), bias)


def test_evaluation_counts_by_domain_and_equals_the_reference():
    """Uncut or cut, evaluation is handed no state and returns sums alone: nothing that it counts can reach a bias."""
    config, tensors, batch = step_config(RELEASED), random_tensors(RELEASED, seed=1), rows()
    state = state_of(tensors, config)
    sums = quick_jit(make_eval_step(config, DOMAINS))(state.params, state.bias, cut(batch, 2))
    expected = objective(tensors, RELEASED, batch, mtp_weight=0.0, alpha=0.0, n_domains=DOMAINS)
    np.testing.assert_array_equal(sums["load"], expected["load"])
    np.testing.assert_array_equal(sums["domain_load"].sum(axis=1), expected["load"])
    np.testing.assert_allclose(sums["domain_loss_sum"], expected["domain_loss_sum"], rtol=3e-6)
    np.testing.assert_array_equal(sums["domain_tokens"], expected["domain_tokens"])
    assert sums["mtp_tokens"].tolist() == [11]
    assert float(sums["mtp_loss_sum"][0]) == pytest.approx(11 * expected["mtp_loss"], rel=3e-6)
    # One domain at a time: what the tokens of the other chose is not in it.
    main = numpy_model.forward(tensors, RELEASED, batch["tokens"][:, :-1], batch["segment_ids"][:, :-1])["routing"][1]
    for domain in range(DOMAINS):
        counted = (batch["segment_ids"][:, :-1] != 0) & (batch["domain_ids"][:, :-1] == domain)
        expected_load = numpy_model.expert_counts(main["indices"], 8, counted)
        np.testing.assert_array_equal(sums["domain_load"][0, domain], expected_load)


def abstract_state(config):
    variables = abstract_variables(config.model)
    opt_state = jax.eval_shape(partial(init_optimizer, config.train), variables.params)
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(variables.params, opt_state, variables.bias_LE, zero, zero, zero)


def traced_step(config, batch=(1, 4, 33)):
    tokens = {name: jax.ShapeDtypeStruct(batch, jnp.int32) for name in ("tokens", "segment_ids", "domain_ids")}
    hyper = Hyper(*[jax.ShapeDtypeStruct((), jnp.float32)] * 3)
    return jax.make_jaxpr(make_train_step(config, DOMAINS))(abstract_state(config), tokens, hyper)


def tiny(**model):
    config = preset("tiny")
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model), train=dataclasses.replace(config.train, batch_size=4,
                                                                                            batch_size_start=4)
    )  # fmt: skip


def test_the_step_never_holds_the_logits_of_all_positions():
    """Neither as [B, T, V] nor in any other shape: MTP's included, forward and backward."""
    config = tiny(vocab_size=5000)
    whole = 4 * 32 * 5000
    sizes = {int(np.prod(a.shape)) for a in arrays(traced_step(config))}
    weights = max(int(np.prod(p.shape)) for p in jax.tree.leaves(abstract_state(config).params))
    assert weights < whole and max(sizes) < whole, max(sizes)
    assert whole // 4 in sizes  # the chunk of a quarter of the positions is there: the measure sees logits


def test_the_program_does_not_grow_with_depth():
    """What is compiled for 3 and for 30 layers has equally many operations; only shapes differ."""
    shallow, deep = (sum(1 for _ in equations(traced_step(tiny(num_hidden_layers=n)))) for n in (3, 30))
    assert shallow == deep > 500


def test_router_norms_softmax_and_rotation_stay_in_float32_when_the_rest_computes_in_bfloat16():
    step = traced_step(tiny(compute_dtype="bfloat16", remat="report", experts_implementation="dense"))
    careful = {"rsqrt", "top_k", "cos", "sin", "log", "exp", "reduce_max"}
    seen, products = set(), {"bfloat16": 0, "float32": 0}
    for equation in equations(step):
        name, dtypes = equation.primitive.name, {str(v.aval.dtype) for v in equation.invars if hasattr(v.aval, "dtype")}
        if name in careful:
            seen.add(name)
            assert "bfloat16" not in dtypes, equation
        if name == "dot_general":
            products[str(equation.invars[0].aval.dtype)] += 1
            shapes = {v.aval.shape for v in equation.invars}
            if (64, 16) in shapes and any(s[-1:] == (64,) for s in shapes):  # hidden x experts: the router
                assert dtypes == {"float32"}, equation
    assert seen == careful and products["bfloat16"] > products["float32"] > 0


def test_bfloat16_parameters_keep_float32_gradients_over_micro_batches():
    config = step_config(PLAIN, model={"param_dtype": "bfloat16", "compute_dtype": "bfloat16"})
    state = jax.eval_shape(lambda: init_state(config))
    assert {str(p.dtype) for p in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert state.bias.dtype == jnp.float32
    shapes = {name: jax.ShapeDtypeStruct((2, 2, 8), jnp.int32) for name in rows()}
    run = partial(gradients, config=config, controller=controller_of(config), n_domains=DOMAINS)
    grads, terms = jax.eval_shape(run, state, shapes, HYPER)
    assert {str(g.dtype) for g in jax.tree.leaves(grads)} == {"float32"} and terms.load_LE.dtype == jnp.int32


def test_all_dense_model_trains():
    dense = PLAIN | {"first_k_dense_replace": 1}
    config = step_config(dense)
    step, state, losses = make_train_step(config, DOMAINS), state_of(random_tensors(dense, seed=1), config), []
    for _ in range(8):
        state, metrics = step(state, cut(rows(), 2), HYPER._replace(learning_rate=jnp.float32(1e-2)))
        losses.append(float(metrics["main_loss"]))
    assert losses[-1] < 0.8 * losses[0] and metrics["load"].shape == (0, 8) and metrics["max_vio"].shape == (0,)
