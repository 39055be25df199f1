"""The chunked cross entropy: any chunk, any weight, large logits, BF16; and never the logits of all positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.training.loss import chunk_length, cross_entropy
from oracles import checks_loss
from oracles.jaxprs import largest_array


@pytest.mark.parametrize("chunk", [1, 3, 7, 16], ids=["one", "not a divisor", "whole", "longer than the sequence"])
def test_value_and_both_gradients_equal_the_reference_at_any_chunk(chunk):
    checks_loss.check_cross_entropy(chunk=chunk)


def test_logits_in_the_thousands_overflow_nothing():
    checks_loss.check_cross_entropy(scale=1000.0)


def test_bfloat16_loses_only_its_own_rounding():
    checks_loss.check_cross_entropy(dtype="bfloat16")


def test_weights_of_zero_give_zero_and_no_gradient():
    checks_loss.check_cross_entropy(weighted=False)


def test_gradient_scales_with_the_cotangent():
    x, head = jnp.ones((1, 4, 3)), jnp.arange(15.0).reshape(5, 3) / 7
    targets, weights = jnp.asarray([[0, 1, 2, 3]], jnp.int32), jnp.ones((1, 4))
    one, three = (jax.grad(lambda x, s=s: s * cross_entropy(x, head, targets, weights, 2)[0])(x) for s in (1.0, 3.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_only_one_chunk_of_logits_is_alive_forward_and_backward():
    batch, length, vocab, chunk = 2, 32, 640, 4
    x, head = jnp.zeros((batch, length, 4)), jnp.zeros((vocab, 4))
    targets, weights = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length))

    def gradient(x, head):
        return jax.grad(lambda x, head: cross_entropy(x, head, targets, weights, chunk)[0], argnums=(0, 1))(x, head)

    assert largest_array(jax.make_jaxpr(gradient)(x, head)) == batch * chunk * vocab
    # The measure would notice: a chunk as long as the sequence holds all of them.
    whole = jax.make_jaxpr(lambda x: cross_entropy(x, head, targets, weights, length)[0])(x)
    assert largest_array(whole) == batch * length * vocab


@given(st.integers(1, 64), st.integers(1, 5000), st.integers(1, 200000), st.integers(1, 2**24))
def test_chunk_keeps_to_the_budget_and_to_a_quarter_of_the_sequence(batch, length, vocab, budget):
    chunk = chunk_length(batch, length, vocab, budget)
    assert 1 <= chunk <= max(1, -(-length // 4))
    assert chunk == 1 or chunk * batch * vocab <= budget
