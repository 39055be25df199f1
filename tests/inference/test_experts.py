"""Experts that are arrays of their own, by rows and by experts: eq. 12 in NumPy loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import experts as serving_experts
from dsv3_jax.inference.experts import BLOCK, expert_by_expert, gated, moe, row_by_row
from dsv3_jax.inference.serving import joined
from dsv3_jax.moe.experts import routed_experts
from oracles import numpy_moe
from oracles.decoding import tiny
from oracles.numpy_layers import sigmoid

N_EXPERTS, HIDDEN, WIDTH = 5, 6, 4
RNG = np.random.default_rng(0)
GATE, UP = RNG.standard_normal((2, N_EXPERTS, HIDDEN, WIDTH))
DOWN = RNG.standard_normal((N_EXPERTS, WIDTH, HIDDEN))


def apart(side_by_side):
    """Tuples of float32 matrices, gate and up side by side or not."""
    pair = np.concatenate([GATE, UP], axis=-1)
    named = {"gate_proj+up_proj": pair} if side_by_side else {"gate_proj": GATE, "up_proj": UP}
    return {name: tuple(jnp.asarray(w, jnp.float32) for w in stack) for name, stack in (named | {"down_proj": DOWN}).items()}


def expert(e, x):
    g = x @ GATE[e]
    return (g * sigmoid(g) * (x @ UP[e])) @ DOWN[e]


@pytest.mark.parametrize("run", [row_by_row, expert_by_expert, partial(expert_by_expert, block=3), routed_experts])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_the_gated_sum_of_the_chosen_experts(run, side_by_side):
    rng, run = np.random.default_rng(1), jax.jit(run)
    n_tokens = 3 * BLOCK  # so that an expert has several blocks, one has none, and the last one's reaches beyond the end
    x, gates = rng.standard_normal((n_tokens, HIDDEN)), rng.random((n_tokens, 2))
    indices = np.stack([rng.permutation([0, 2, 3, N_EXPERTS - 1])[:2] for _ in range(n_tokens)])
    assert BLOCK < np.bincount(indices.reshape(-1))[-1]
    rows = zip(x, indices, gates, strict=True)
    expected = [sum(g * expert(e, row) for e, g in zip(*choice, strict=True)) for row, *choice in rows]
    arguments = jnp.asarray(x, jnp.float32), jnp.asarray(indices, jnp.int32), jnp.asarray(gates, jnp.float32)
    # float32 against float64
    np.testing.assert_allclose(run(*arguments, apart(side_by_side)), expected, atol=1e-5)


def test_matrices_side_by_side_give_what_they_give_by_themselves():
    x, params = jnp.asarray(RNG.standard_normal((3, HIDDEN)), jnp.float32), {name: w[1] for name, w in apart(False).items()}
    pair = {name: w[1] for name, w in apart(True).items()}
    np.testing.assert_allclose(
        joined(pair, ("gate_proj", "up_proj"), x), joined(params, ("gate_proj", "up_proj"), x), atol=1e-6
    )
    expected = [expert(1, row) for row in np.asarray(x, np.float64)]
    for either in (params, pair):
        np.testing.assert_allclose(gated(either, x), expected, atol=1e-5)


@pytest.mark.parametrize("most_rows", [0, 64])
def test_the_layer_adds_routed_and_shared_experts(most_rows, monkeypatch):
    """Whichever way the routed rows are computed."""
    monkeypatch.setattr(serving_experts, "MOST_ROWS", most_rows)
    model = tiny()
    params, bias_E = model.model.layers[1]
    assert isinstance(params["mlp"]["experts"]["down_proj"], tuple)
    u_BTD = RNG.standard_normal((2, 3, model.released["hidden_size"]))
    run = jax.jit(lambda *arguments: moe(*arguments, model.config))
    got, routing = run(params["mlp"], bias_E, jnp.asarray(u_BTD, jnp.float32))
    for u_TD, y_TD, indices in zip(u_BTD, got, routing.indices, strict=True):
        expected, record = numpy_moe.moe(u_TD, model.tensors, "model.layers.1.mlp.", model.released)
        np.testing.assert_allclose(y_TD, expected, atol=1e-5)
        assert np.array_equal(np.sort(indices, axis=-1), np.sort(record["indices"], axis=-1))


def test_experts_take_their_rows_together_where_there_are_many_or_weights_are_narrow(monkeypatch):
    taken = []
    for name in ("row_by_row", "expert_by_expert"):
        monkeypatch.setattr(serving_experts, name, lambda u, *_, name=name, **__: taken.append(name) or u)
    model = tiny()
    params, bias_E = model.model.layers[1]
    for dtype, n_tokens in ((jnp.float32, BLOCK + 1), (jnp.bfloat16, BLOCK + 1), (jnp.bfloat16, BLOCK), (jnp.float32, 33)):
        own = jax.tree.map(lambda w, dtype=dtype: w.astype(dtype), params["mlp"])
        moe(own, bias_E, jnp.zeros((1, n_tokens, model.config.hidden_size), dtype), model.config)
    assert taken == ["row_by_row", "expert_by_expert", "row_by_row", "expert_by_expert"]
