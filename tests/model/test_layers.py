"""RMSNorm and SwiGLU against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.layers import rms_norm, swiglu
from dsv3_jax.presets import preset
from oracles import numpy_layers


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
    actual = swiglu({name: jnp.asarray(w) for name, w in params.items()}, jnp.asarray(x), preset("tiny").model)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)
