"""AdamW against optax and against float64 NumPy [§4.2]."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import TrainConfig
from dsv3_jax.training.optimizer import apply_optimizer, global_norm, init_optimizer, is_norm

FP32 = TrainConfig(moment_dtype="float32", learning_rate=1e-2)


def example_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layers": {
            "q_proj": jax.random.normal(keys[0], (3, 8, 5), jnp.float32).astype(dtype),
            "input_layernorm": jnp.ones((3, 8), jnp.float32),
        },
        "embed": jax.random.normal(keys[1], (11, 8), jnp.float32).astype(dtype),
    }


def example_grads(step, scale=1.0):
    keys = iter(jax.random.split(jax.random.key(100 + step), 3))
    return jax.tree.map(lambda p: scale * jax.random.normal(next(keys), p.shape, jnp.float32), example_params())


def run(train, params, gradients, rates):
    state = init_optimizer(train, params)
    step = jax.jit(apply_optimizer, static_argnums=0)
    for grads, rate in zip(gradients, rates, strict=True):
        params, state = step(train, grads, state, params, jnp.float32(rate), global_norm(grads))
    return params, state


def numpy_adamw(train, params, gradients, rates):
    """Float64 Adam with clipping and decoupled decay, written from the paper's equations."""
    weights = jax.tree_util.tree_map_with_path(lambda path, p: (is_norm(path), np.asarray(p, np.float64)), params)
    leaves = [list(leaf) for leaf in jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, tuple))]
    m, v = ([np.zeros_like(w) for _, w in leaves] for _ in range(2))
    for t, (tree, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        for i, (norm_gain, w) in enumerate(leaves):
            x = g[i] * min(1.0, train.grad_clip / norm)
            m[i] = train.adam_b1 * m[i] + (1 - train.adam_b1) * x
            v[i] = train.adam_b2 * v[i] + (1 - train.adam_b2) * x**2
            m_hat, v_hat = m[i] / (1 - train.adam_b1**t), v[i] / (1 - train.adam_b2**t)
            decay = 0.0 if norm_gain and not train.decay_norms else train.weight_decay
            leaves[i][1] = w - rate * (m_hat / (np.sqrt(v_hat) + train.adam_eps) + decay * w)
    return [w for _, w in leaves]


RATES = [1e-2, 3e-2, 2e-2, 1e-2, 5e-3, 1e-3]
# Both sides of the clipping limit: norms of about 10, 0.1, 10, ...
GRADIENTS = [example_grads(i, scale) for i, scale in enumerate([1, 0.01, 1, 0.01, 0.01, 1])]


@pytest.mark.parametrize("decay_norms", [False, True])
def test_updates_equal_a_float64_adam_with_clipping_and_decoupled_decay(decay_norms):
    train = TrainConfig(moment_dtype="float32", decay_norms=decay_norms)
    params, state = run(train, example_params(), GRADIENTS, RATES)
    for ours, oracle in zip(jax.tree.leaves(params), numpy_adamw(train, example_params(), GRADIENTS, RATES), strict=True):
        # Six updates of size <= 0.03 on weights of size 1, each rounded to float32 (6e-8): 1e-6 is a few roundings.
        np.testing.assert_allclose(ours, oracle, rtol=1e-6, atol=1e-6)
    assert int(state.n_updates) == len(RATES)


def test_updates_equal_optax_adamw_behind_its_own_clipping():
    params = example_params()
    mask = {"layers": {"q_proj": True, "input_layernorm": False}, "embed": True}
    rates = jnp.array(RATES, jnp.float32)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda count: rates[count], FP32.adam_b1, FP32.adam_b2, FP32.adam_eps, weight_decay=0.1, mask=mask),
    )
    expected = params
    with jax.numpy_dtype_promotion("standard"):  # optax promotes inside
        state = reference.init(params)
        for grads in GRADIENTS:
            updates, state = reference.update(grads, state, expected)
            expected = optax.apply_updates(expected, updates)
    ours, _ = run(FP32, params, GRADIENTS, RATES)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_global_norm_is_the_norm_of_all_leaves_together_in_float32():
    grads = example_grads(3)
    expected = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert float(global_norm(grads)) == pytest.approx(expected, rel=1e-6)
    # 257 ones in BF16 would sum to 256 if the sum were taken in BF16.
    assert float(global_norm({"a": jnp.ones(257, jnp.bfloat16)})) == pytest.approx(np.sqrt(257), rel=1e-6)


def test_a_zero_gradient_only_decays_the_matrices():
    params, zeros = example_params(), jax.tree.map(jnp.zeros_like, example_params())
    after, _ = run(FP32, params, [zeros], [0.5])
    np.testing.assert_allclose(after["embed"], params["embed"] * np.float32(1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(after["layers"]["input_layernorm"], params["layers"]["input_layernorm"])


def test_moments_have_the_configured_dtype_and_masters_exist_only_beside_narrow_parameters():
    for moments in ("float32", "bfloat16"):
        for dtype in (jnp.float32, jnp.bfloat16):
            params, state = run(TrainConfig(moment_dtype=moments), example_params(dtype), GRADIENTS[:1], RATES[:1])
            assert {x.dtype.name for x in jax.tree.leaves((state.mu, state.nu))} == {moments}
            assert jax.tree.map(lambda p: p.dtype, params) == jax.tree.map(lambda p: p.dtype, example_params(dtype))
            assert (state.master is None) == (dtype == jnp.float32)


def test_bf16_parameters_are_the_rounded_masters_and_small_updates_are_not_lost():
    start = example_params(jnp.bfloat16)
    rates = [1e-4] * 40  # each update is below half a BF16 ulp of a weight of size 1 (4e-3), all 40 together are not
    gradients = [GRADIENTS[0]] * 40
    params, state = run(FP32, start, gradients, rates)
    for p, master in zip(jax.tree.leaves(params), jax.tree.leaves(state.master), strict=True):
        np.testing.assert_array_equal(p, master.astype(p.dtype))
    oracle = numpy_adamw(FP32, start, gradients, rates)
    for master, expected in zip(jax.tree.leaves(state.master), oracle, strict=True):
        np.testing.assert_allclose(master, expected, rtol=1e-5, atol=1e-5)  # 40 roundings to float32
    assert np.abs(np.asarray(state.master["embed"]) - np.asarray(start["embed"], np.float32)).min() > 3e-3


def test_bf16_moments_follow_the_float32_ones_within_their_own_rounding():
    exact, _ = run(FP32, example_params(), GRADIENTS, RATES)
    stored, _ = run(TrainConfig(moment_dtype="bfloat16"), example_params(), GRADIENTS, RATES)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(stored), strict=True):
        # Moments rounded to 2^-9 relative at each of six steps: about 1 % of a total update of at most sum(RATES) x 1.5.
        np.testing.assert_allclose(a, b, atol=0.01 * 1.5 * sum(RATES))
        assert not np.array_equal(a, b)


@pytest.mark.parametrize("name", ["input_layernorm", "kv_a_layernorm", "norm", "enorm", "hnorm"])
def test_gains_are_known_by_name_whatever_their_rank(name):
    assert is_norm((jax.tree_util.DictKey("layers"), jax.tree_util.DictKey(name)))
    assert is_norm((jax.tree_util.DictKey(name), jax.tree_util.DictKey("scale")))
    assert not is_norm((jax.tree_util.DictKey("layers"), jax.tree_util.DictKey("kv_b_proj")))
