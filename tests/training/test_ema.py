"""The host-side parameter average against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training.ema import init_ema, update_ema


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.98])
def test_the_average_is_the_normalised_geometric_sum_of_what_it_was_shown(decay):
    rng = np.random.default_rng(0)
    history = rng.standard_normal((30, 4, 3)).astype(np.float32)
    ema = init_ema({"w": history[0] * 100})  # what it is initialised like must not matter
    for n, w in enumerate(history, start=1):
        ema = update_ema(ema, {"w": w}, decay)
        weights = np.float64(decay) ** np.arange(n)[::-1]
        expected = np.einsum("n,nij->ij", weights / weights.sum(), history[:n].astype(np.float64))
        # float32 accumulation of at most 30 numbers of size 1
        np.testing.assert_allclose(ema.average["w"], expected, rtol=0, atol=2e-6)
    assert ema.n_updates == 30


def test_the_first_update_is_the_parameters_themselves_in_float32():
    ema = update_ema(init_ema({"w": jnp.zeros(3, jnp.bfloat16)}), {"w": jnp.array([1.5, 2.5, -3], jnp.bfloat16)}, 0.999)
    assert ema.average["w"].dtype == np.float32
    np.testing.assert_array_equal(ema.average["w"], [1.5, 2.5, -3])


def test_the_average_does_not_alias_the_parameters():
    params = {"w": np.ones(3, np.float32)}
    ema = update_ema(init_ema(params), params, 0.9)
    params["w"][:] = 7
    np.testing.assert_array_equal(ema.average["w"], 1)
