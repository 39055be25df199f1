"""A whole mixture-of-experts layer against the float64 loop over tokens, with none, one and two shared experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.moe.layer import moe, moe_spec
from oracles import numpy_moe
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors


@pytest.mark.parametrize("shared, implementation", [(0, "dense"), (1, "bucketed"), (2, "dense")])
def test_layer_equals_the_loop_over_tokens(shared, implementation):
    released = SMALL_CONFIG | {"n_shared_experts": shared}
    config, tensors = model_config(released, experts_implementation=implementation), random_tensors(released, seed=5)
    params, bias = from_checkpoint(tensors, config)
    weights = jax.tree.map(lambda a: a[0], params["moe_layers"]["mlp"])
    assert jax.tree.structure(weights) == jax.tree.structure(dict(moe_spec(config)), is_leaf=lambda s: hasattr(s, "axes"))
    u = np.random.default_rng(0).standard_normal((2, 9, 24)).astype(np.float32)
    actual, routing = quick_jit(lambda u: moe(weights, bias[0], u, config))(jnp.asarray(u))
    for b in range(2):
        expected, record = numpy_moe.moe(u[b].astype(np.float64), tensors, "model.layers.1.mlp.", released)
        assert min(record["margin"].min(), record["group_margin"].min()) > 1e-5
        np.testing.assert_array_equal(routing.indices[b], record["indices"])
        np.testing.assert_allclose(actual[b], expected, rtol=0, atol=3e-5)  # entries of order 1 to 5


def test_router_reads_float32_weights_where_the_experts_compute_in_bfloat16():
    config = model_config(SMALL_CONFIG, compute_dtype="bfloat16")
    params, bias = from_checkpoint(random_tensors(SMALL_CONFIG, seed=5), config)
    weights = jax.tree.map(lambda a: a[0], params["moe_layers"]["mlp"])
    u = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 24)), jnp.bfloat16)
    out, routing = quick_jit(lambda u: moe(weights, bias[0], u, config))(u)
    assert out.dtype == jnp.bfloat16 and routing.gates.dtype == jnp.float32
    exact = np.asarray(u, np.float64)[0] @ np.asarray(weights["gate"], np.float64)
    np.testing.assert_allclose(routing.logits[0], exact, rtol=0, atol=1e-5)
