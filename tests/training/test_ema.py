"""The host-side parameter average against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.parallel.arrays import to_mesh
from dsv3_jax.training.ema import Ema, Pieces, init_ema, update_ema, whole_average


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


@pytest.mark.parametrize("stored", [P("x", "y"), P(None, "y"), P(None, None)])
def test_pieces_of_an_average_are_those_of_the_whole_one_however_the_parameters_lie(stored):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    held, rng = NamedSharding(mesh, P("x", "y")), np.random.default_rng(0)
    whole, pieces = init_ema({"w": np.zeros((4, 8))}), Ema({"w": Pieces.zeros((4, 8), held)}, 0)
    assert {part.shape for part in pieces.average["w"].parts.values()} == {(2, 2)} and len(pieces.average["w"].parts) == 8
    for _ in range(3):
        w = rng.standard_normal((4, 8)).astype(np.float32)
        whole = update_ema(whole, {"w": w}, 0.9)
        pieces = update_ema(pieces, {"w": to_mesh(w, NamedSharding(mesh, stored))}, 0.9)
    array = whole_average(pieces)["w"]
    assert array.sharding == held
    np.testing.assert_array_equal(array, whole.average["w"])
    again = Pieces.of(array)
    assert again.parts.keys() == pieces.average["w"].parts.keys()
    pieces.average["w"].parts[((0, 2), (0, 2))][:] = 7  # what was handed out or restored is nobody else's
    np.testing.assert_array_equal(array, whole.average["w"])
    np.testing.assert_array_equal(again.array(), whole.average["w"])
