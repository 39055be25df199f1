"""What each rematerialisation policy keeps, that it recomputes the rest, and that none of them changes a result."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.transformer import block, make_context
from dsv3_jax.remat import rematerialised
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.jaxprs import equations
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors


def one_block(remat):
    """A dense block under a policy, as a function of its weights and input."""
    config = model_config(SMALL_CONFIG, remat=remat)
    params, _ = from_checkpoint(random_tensors(SMALL_CONFIG, seed=3), config)
    weights = jax.tree.map(lambda a: a[0], params["dense_layers"])
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 6, 24)), jnp.float32)
    context = make_context(jnp.ones((1, 6), jnp.int32), config, cross_document=True)
    return rematerialised(lambda weights, x: block(weights, None, x, context, config)[0], config), weights, x


def saved_elements(remat):
    """What the forward pass hands to the backward pass, weights and input excluded."""
    function, weights, x = one_block(remat)
    residuals = jax.tree.leaves(jax.eval_shape(lambda w, x: jax.vjp(function, w, x)[1], weights, x))
    given = sum(a.size for a in jax.tree.leaves((weights, x)))
    return sum(math.prod(a.shape) for a in residuals) - given


def test_the_report_s_policy_keeps_less_than_none():
    assert saved_elements("report") < saved_elements("none")


def test_the_report_s_policy_recomputes_the_up_projections():
    assert products("report") >= products("none") + 2  # of queries, of keys and values


def test_full_rematerialisation_keeps_the_block_s_input_alone_and_recomputes_every_product():
    assert saved_elements("full") <= 200  # the rotary tables of 6 positions at most
    assert products("full") >= products("none") + 9  # five projections, two of the core, two of the SwiGLU


def products(remat):
    """Matrix products in the gradient's program, those that run again included."""
    function, weights, x = one_block(remat)
    jaxpr = jax.make_jaxpr(jax.grad(lambda w, x: function(w, x).sum()))(weights, x)
    return sum(e.primitive.name == "dot_general" for e in equations(jaxpr))


def test_policies_change_neither_value_nor_gradient():
    results = {}
    for remat in ("none", "report", "full"):
        function, weights, x = one_block(remat)
        results[remat] = quick_jit(jax.value_and_grad(lambda w, x, f=function: jnp.square(f(w, x)).sum()))(weights, x)
    for remat in ("report", "full"):
        for a, b in zip(jax.tree.leaves(results["none"]), jax.tree.leaves(results[remat]), strict=True):
            # The same float32 operations, which XLA may fuse differently: relative to the tensor's size.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(a).max()))


def test_an_unknown_policy_is_refused_by_the_config():
    with pytest.raises(Exception, match="remat"):
        dataclasses.replace(model_config(SMALL_CONFIG), remat="some")
