"""RMSNorm and SwiGLU against NumPy; what each rematerialisation policy keeps, and that none of them changes a result."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.layers import rms_norm, swiglu
from dsv3_jax.model.transformer import block, make_context
from dsv3_jax.remat import rematerialised
from oracles import numpy_layers
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.jaxprs import equations
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors


@pytest.mark.parametrize("scale, eps", [(1.0, 1e-6), (1e-3, 1e-5), (1e4, 1e-6)])
def test_norm_equals_the_reference_at_any_size_of_activations(scale, eps):
    rng = np.random.default_rng(0)
    x, gain = (scale * rng.standard_normal((3, 4, 8))).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    expected = numpy_layers.rms_norm(x.astype(np.float64), gain.astype(np.float64), eps)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(gain), eps), expected, rtol=2e-6, atol=1e-6)


def test_norm_of_bfloat16_is_computed_in_float32_and_rounded_once():
    x, gain = jnp.asarray(np.random.default_rng(1).standard_normal((5, 16)), jnp.bfloat16), jnp.full(16, 1.1)
    expected = rms_norm(x.astype(jnp.float32), gain, 1e-6).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rms_norm(x, gain, 1e-6), expected)


def test_swiglu_equals_the_reference():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 6)).astype(np.float32)
    shapes = {"gate_proj": (6, 10), "up_proj": (6, 10), "down_proj": (10, 6)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = {f"{name}.weight": weight.T.astype(np.float64) for name, weight in params.items()}
    expected = numpy_layers.swiglu(x.astype(np.float64), tensors, "")
    actual = swiglu({name: jnp.asarray(w) for name, w in params.items()}, jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


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
