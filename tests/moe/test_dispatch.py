"""The plan of who goes where, and the two linear maps that follow it."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dsv3_jax.moe.dispatch import combine, dispatch, make_plan


def choices(n_tokens: int, k: int, n_experts: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(n_experts, k, replace=False) for _ in range(n_tokens)]).astype(np.int32)


@st.composite
def cases(draw: st.DrawFn) -> np.ndarray:
    # Every shape is compiled anew, so there are few of them, the edges among them.
    n_tokens, k, n_experts = draw(st.sampled_from([(1, 1, 1), (1, 4, 4), (12, 1, 3), (9, 2, 9), (5, 3, 3)]))
    return choices(n_tokens, k, n_experts, draw(st.integers(0, 99)))


def check_plan(indices_NK: np.ndarray, n_experts: int) -> None:
    plan = jax.jit(make_plan, static_argnums=1)(jnp.asarray(indices_NK), n_experts)
    order = np.argsort(indices_NK.ravel(), kind="stable")
    np.testing.assert_array_equal(plan.choice_R, order)
    np.testing.assert_array_equal(plan.token_R, order // indices_NK.shape[1])
    np.testing.assert_array_equal(np.asarray(plan.choice_R)[plan.row_NK], np.arange(order.size).reshape(indices_NK.shape))
    counts = np.bincount(indices_NK.ravel(), minlength=n_experts)
    np.testing.assert_array_equal(plan.count_E, counts)
    np.testing.assert_array_equal(plan.start_E, np.cumsum(counts) - counts)
    assert all(leaf.dtype == jnp.int32 for leaf in plan)


@settings(max_examples=15)
@given(cases(), st.sampled_from([9, 11]))
def test_rows_are_ordered_by_expert_then_token_and_every_choice_has_its_row(indices_NK, n_experts):
    check_plan(indices_NK, n_experts)


def test_the_plan_is_the_same_where_expert_and_position_do_not_fit_one_int32():
    check_plan(choices(1024, 2, 20, seed=0), n_experts=2**31 // 2048)


@settings(max_examples=10)
@given(cases())
def test_dispatch_and_combine_are_each_others_transposes(indices_NK):
    rng = np.random.default_rng(0)
    plan = make_plan(jnp.asarray(indices_NK), 9)
    x_ND, rows_RD = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (len(indices_NK), indices_NK.size))
    token_R = np.argsort(indices_NK.ravel(), kind="stable") // indices_NK.shape[1]
    summed_ND = np.zeros(x_ND.shape)
    np.add.at(summed_ND, token_R, rows_RD)

    copies_RD, dispatch_transposed = jax.vjp(lambda x: dispatch(x, plan), x_ND)
    total_ND, combine_transposed = jax.vjp(lambda rows: combine(rows, plan), rows_RD)
    np.testing.assert_array_equal(copies_RD, x_ND[token_R])
    np.testing.assert_array_equal(combine_transposed(x_ND)[0], x_ND[token_R])
    for sums in (total_ND, dispatch_transposed(rows_RD)[0]):  # up to nine terms of order one: a few units in the last place
        np.testing.assert_allclose(sums, summed_ND, atol=3e-6)


def test_combine_accumulates_in_float32_and_keeps_the_rows_dtype():
    plan = make_plan(jnp.arange(3, dtype=jnp.int32)[None, :], 3)
    rows_RD = jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16)  # in bfloat16 256 + 1 is 256
    total_ND = combine(rows_RD, plan)
    assert total_ND.dtype == jnp.bfloat16
    assert total_ND.item() == 258.0


@pytest.mark.parametrize("function", [dispatch, combine])
def test_no_scatter_of_float_rows_in_the_gradient(function):
    plan = make_plan(jnp.asarray(choices(4, 2, 3, seed=0)), 3)
    rows = jnp.ones((4 if function is dispatch else 8, 5))
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(lambda rows: function(rows, plan).sum()))(rows))
