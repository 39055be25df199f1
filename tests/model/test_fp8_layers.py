"""The layers that FP8 makes one operation of several: SwiGLU with its down projection, attention with what comes after it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Fp8Recipe
from dsv3_jax.fp8.delayed import Delayed
from dsv3_jax.fp8.precision import attention_cache, products, swiglu_cache
from dsv3_jax.model import mla
from dsv3_jax.model.layers import swiglu
from dsv3_jax.model.rope import rope_tables
from dsv3_jax.presets import preset
from oracles import numpy_fp8
from oracles.compiling import quick_jit

TINY = preset("tiny").model
# One of hundreds of values rounds to the other neighbour, 2^-4 off; to leave out a rounding moves all of them.
SAME_ROUNDING = 3e-3


def configured(**recipe):
    return replace(TINY, fp8=Fp8Recipe(**recipe))


def normal(*shape, seed, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def float64(a):
    return np.asarray(a.astype(jnp.float32), np.float64)


def as_stored(a, dtype):
    return float64(jnp.asarray(a, jnp.float32).astype(dtype))


def relative(got, expected):
    return np.linalg.norm(float64(got) - expected) / np.linalg.norm(expected)


def swiglu_in_float64(x, weights, dy, config, dtype):
    """y, dx and the three weights' gradients; what is handed from one operation to the next, in `dtype`."""
    up, down, cache = products(config, "up_proj"), products(config, "down_proj"), swiglu_cache(config)
    w_gate, w_up, w_down = (numpy_fp8.rounded(w, how.weight) for w, how in zip(weights, (up, up, down), strict=True))
    x8 = numpy_fp8.rounded(x, up.x)
    g, u = (as_stored(x8 @ w, dtype) for w in (w_gate, w_up))

    def silu(g):
        return g / (1 + np.exp(-g))

    y = numpy_fp8.rounded(silu(g) * u, down.x) @ w_down
    g, u = numpy_fp8.rounded(g, cache), numpy_fp8.rounded(u, cache)
    dh = numpy_fp8.rounded(dy, down.gradient) @ w_down.T
    s = 1 / (1 + np.exp(-g))
    dg, du = (as_stored(d, dtype) for d in (dh * u * s * (1 + g * (1 - s)), dh * silu(g)))
    dx = numpy_fp8.rounded(dg, up.gradient) @ w_gate.T + numpy_fp8.rounded(du, up.gradient) @ w_up.T
    x_wgrad = numpy_fp8.rounded(x8, up.x_wgrad).T
    dgate, dup = (x_wgrad @ numpy_fp8.rounded(d, up.gradient_wgrad) for d in (dg, du))
    ddown = numpy_fp8.rounded(silu(g) * u, down.x_wgrad).T @ numpy_fp8.rounded(dy, down.gradient_wgrad)
    return [y, dx, dgate, dup, ddown]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "recipe", [{"tile": 16}, *(pytest.param(r, marks=pytest.mark.slow) for r in ({}, {"gradient_format": "e5m2"}))], ids=str
)
def test_swiglu_and_its_gradients_are_the_rounded_operands_with_its_inputs_from_the_cache(recipe, dtype):
    config, hidden, width = configured(**recipe), 40, 150
    x, dy = normal(37, hidden, seed=0, dtype=dtype), normal(37, hidden, seed=1, dtype=dtype)
    shapes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    weights = {n: normal(*s, seed=i, scale=s[0] ** -0.5) for i, (n, s) in enumerate(shapes.items(), 2)}

    def both(x, weights, dy):
        y, pull_back = jax.vjp(lambda x, weights: swiglu(weights, x, config), x, weights)
        dx, dweights = pull_back(dy)
        return [y, dx, *(dweights[name] for name in shapes)]

    got = quick_jit(both)(x, weights, dy)
    expected = swiglu_in_float64(float64(x), [float64(w) for w in weights.values()], float64(dy), config, dtype)
    # y and dx are rounded to `dtype` at their end; a product whose float32 sum rounds to the other BF16 moves little more.
    last = 2**-8 if dtype == jnp.bfloat16 else 0
    for name, a, b in zip(("y", "dx", *shapes), got, expected, strict=True):
        assert relative(a, b) < SAME_ROUNDING + last * (name in ("y", "dx")), (name, relative(a, b))
    assert {w.dtype for w in got[2:]} == {jnp.dtype(jnp.float32)}
    for dw in got[2:]:  # whatever the activations are: not rounded to BF16 on the way
        assert (np.asarray(dw) != float64(dw.astype(jnp.bfloat16))).mean() > 0.9


def test_the_down_projection_s_delayed_scale_is_its_history_s_and_it_says_what_it_met():
    config = configured(scaling="delayed", amax_history=2)
    hidden = 8
    x, dy = normal(6, hidden, seed=0), normal(6, hidden, seed=1)
    history = jnp.array([[0.0, 0.25], [0.0, 4.0], [0.0, 16.0]])  # of x, W and dy; nothing in the last step
    plain = {n: normal(hidden, hidden, seed=i) for i, n in enumerate(("gate_proj", "up_proj", "down_proj"), 2)}
    weights = {n: Delayed(w, history if n == "down_proj" else 0 * history) for n, w in plain.items()}
    y, pull_back = jax.vjp(lambda w: swiglu(w, x, config), weights)
    how = products(config, "up_proj")
    g, u = (numpy_fp8.rounded(x, how.x) @ numpy_fp8.rounded(plain[n], how.weight) for n in ("gate_proj", "up_proj"))
    h = g / (1 + np.exp(-g)) * u

    def with_amax(a, amax):
        return numpy_fp8.cast(a * 448 / amax, how.x.form) * amax / 448

    assert np.abs(h).max() > 1  # so that it saturates
    np.testing.assert_allclose(y, with_amax(h, 0.25) @ with_amax(float64(plain["down_proj"]), 4.0), rtol=1e-2, atol=2e-2)
    amax = pull_back(dy)[0]["down_proj"].amax
    np.testing.assert_array_equal(amax[:, 1], np.zeros(3))
    np.testing.assert_allclose(amax[1:, 0], [np.abs(plain["down_proj"]).max(), np.abs(dy).max()])
    np.testing.assert_allclose(amax[0, 0], np.abs(h).max(), rtol=0.15)  # from inputs rounded to 4 bits, twice 2^-4


@pytest.mark.parametrize("cache", ["e5m6", pytest.param("e4m3", marks=pytest.mark.slow), "compute"])
def test_o_proj_s_weight_gradient_is_of_the_attention_s_output_as_it_was_kept(cache, monkeypatch):
    config = configured(attention_cache=cache)
    seen = {}

    def linear(params, name, x, config, kept=None):
        seen[name] = x
        return own(params, name, x, config, kept)

    own = mla.linear
    monkeypatch.setattr(mla, "linear", linear)
    spec = mla.attention_spec(config)
    params = {
        name: jnp.ones(s.shape) if len(s.shape) == 1 else normal(*s.shape, seed=i, scale=s.shape[0] ** -0.5)
        for i, (name, s) in enumerate(spec.items())
    }
    x, dy = normal(2, 9, config.hidden_size, seed=20), normal(2, 9, config.hidden_size, seed=21)
    rope = rope_tables(jnp.tile(jnp.arange(9, dtype=jnp.int32), (2, 1)), config)
    y, pull_back = jax.vjp(lambda o: mla.attention({**params, "o_proj": o}, x, rope, None, config), params["o_proj"])
    how, kept = products(config, "o_proj"), attention_cache(config)
    out = float64(seen["o_proj"]).reshape(18, -1)
    dy8 = numpy_fp8.rounded(float64(dy).reshape(18, -1), how.gradient_wgrad)
    expected = numpy_fp8.rounded(numpy_fp8.rounded(out, kept or how.x), how.x_wgrad).T @ dy8
    assert relative(pull_back(dy)[0].reshape(expected.shape), expected) < 1e-4
