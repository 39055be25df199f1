"""Training in FP8: state in the stated dtypes, one step against BF16's, delayed scaling's history, and a run that goes on."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8.delayed import Delayed, advanced, apart, beside
from dsv3_jax.moe.balance import controller_of
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training import step as training
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.loop import train
from oracles.compiling import quick_jit

SMALL = {
    "num_hidden_layers": 2, "vocab_size": 300, "seq_len": 16, "batch_size": 4, "batch_size_start": 4, "hidden_size": 32,
    "compute_dtype": "bfloat16", "moment_dtype": "bfloat16", "num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def config_of(**settings):
    return override(preset("tiny"), SMALL | settings)


def batch_of(config, seed=0):
    micro = config.train.n_micro_batches
    shape = micro, config.train.batch_size // micro, config.data.seq_len + 1
    tokens = np.random.default_rng(seed).integers(0, 64, shape).astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.ones(shape, jnp.int32), "domain_ids": jnp.zeros(shape, jnp.int32)}


HYPER = training.Hyper(jnp.float32(1e-3), jnp.float32(1e-3), jnp.float32(0.3))
DELAYED = '{"scaling": "delayed", "amax_history": 3}'


@cache
def compiled(config):
    """Once for all tests of a config."""
    controller = controller_of(config)
    return quick_jit(lambda s, b: training.train_step(s, b, HYPER, config=config, controller=controller, n_domains=1))


def stepped(config, state=None, steps=1):
    state = training.init_state(config) if state is None else state
    for i in range(steps):
        state, metrics = compiled(config)(state, batch_of(config, i))
    return state, metrics


def relative(a, b):
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["report", "full"])
def test_rematerialisation_changes_a_step_by_no_more_than_roundings_that_flip(remat):
    plain, again = (stepped(config_of(fp8="report", remat=r))[1]["grad_norm"] for r in ("none", remat))
    assert float(abs(plain - again) / plain) < 1e-3


def test_weight_gradients_reach_the_optimiser_unrounded():
    """In float32, of float32 parameters, though activations are BF16: more than BF16's 8 bits of them are used."""
    config = config_of(fp8="report")

    def gradients(state):
        return training.gradients(state, batch_of(config), HYPER, config, controller_of(config), 1)[0]

    found = quick_jit(gradients)(training.init_state(config))
    layer = found["moe_layers"]
    for name, leaf in {"q_a_proj": layer["self_attn"]["q_a_proj"], **layer["mlp"]["experts"]}.items():
        assert leaf.dtype == jnp.float32
        assert np.any(np.asarray(leaf) != np.asarray(leaf.astype(jnp.bfloat16).astype(jnp.float32))), name


def test_one_step_is_near_the_same_step_in_bfloat16():
    """Gradients differ by what three products of values rounded to 4 bits differ: some per cent, not more."""
    states = [stepped(config_of(fp8=fp8)) for fp8 in ("report", "null")]
    assert abs(float(states[0][1]["loss"] - states[1][1]["loss"])) < 0.02
    assert 0.9 < float(states[0][1]["grad_norm"] / states[1][1]["grad_norm"]) < 1.1
    assert 1e-4 < relative(states[0][0].opt_state.mu, states[1][0].opt_state.mu) < 0.3


def test_state_lies_in_the_stated_dtypes_in_the_checkpoint(tmp_path):
    config = config_of(fp8="report", steps=2, param_dtype="bfloat16", domain_bytes=60_000, eval_sequences=2)
    train(config, tmp_path, header=False, progress=False)
    with Checkpoints(tmp_path / "checkpoints", config) as checkpoints:
        step = checkpoints.latest()
    assert step == 2
    stored = stored_dtypes(tmp_path, step)
    assert stored["mu"] == stored["nu"] == {"bfloat16"} and stored["master"] == {"float32"}
    assert stored["params"] == {"bfloat16"} and stored["bias"] == {"float32"}


def stored_dtypes(folder, step):
    """Of each part of the state, as Orbax's own metadata says."""
    import orbax.checkpoint as ocp

    state = folder.absolute() / "checkpoints" / str(step) / "state"
    tree = ocp.PyTreeCheckpointHandler().metadata(state).tree
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        for part in ("mu", "nu", "master", "params", "bias"):
            if part in names:
                found.setdefault(part, set()).add(str(jnp.dtype(leaf.dtype)))
                break
    return found


def test_delayed_scaling_remembers_the_last_steps_magnitudes_the_newest_first():
    config = config_of(fp8=DELAYED)
    first, _ = stepped(config)
    second, _ = stepped(config, steps=2)
    weight = first.params["dense_layers"]["self_attn"]["o_proj"]
    one, two = (s.amax["dense_layers"]["self_attn"]["o_proj"] for s in (first, second))
    assert one.shape == (1, 3, 3) and np.all(one[..., 0] > 0) and not np.any(one[..., 1:])
    np.testing.assert_array_equal(two[..., 1], one[..., 0])
    start = training.init_state(config).params["dense_layers"]["self_attn"]["o_proj"]
    assert float(one[0, 1, 0]) == float(jnp.abs(start).max()) != float(jnp.abs(weight).max())
    assert first.amax["norm"] is None and first.amax["moe_layers"]["mlp"]["gate"] is None


@pytest.mark.slow
def test_delayed_scaling_is_tensor_scaling_until_there_is_a_history():
    delayed, tensor = (stepped(config_of(fp8=f'{{"scaling": "{s}"}}'))[1] for s in ("delayed", "tensor"))
    assert float(delayed["loss"]) == float(tensor["loss"]) and float(delayed["grad_norm"]) == float(tensor["grad_norm"])


def test_an_operand_that_outgrows_its_history_saturates():
    from dsv3_jax.fp8.linear import linear
    from dsv3_jax.fp8.precision import products

    how = products(config_of(fp8='{"scaling": "delayed", "amax_history": 1}').model, "q_a_proj")
    x, weight = jnp.full((2, 4), 8.0), jnp.eye(4)
    history = jnp.array([[1.0], [1.0], [1.0]])
    np.testing.assert_allclose(linear(x, Delayed(weight, history), how), np.full((2, 4), 1.0), rtol=1e-6)
    np.testing.assert_allclose(linear(x, Delayed(weight, 0 * history), how), x, rtol=1e-6)


def test_the_scale_is_of_the_largest_step_that_is_remembered():
    from dsv3_jax.fp8.linear import linear
    from dsv3_jax.fp8.precision import products

    how = products(config_of(fp8=DELAYED).model, "q_a_proj")
    x, weight = jnp.full((2, 4), 8.0), jnp.eye(4)
    for steps in ([1.0, 1.0, 8.0], [1.0, 8.0, 1.0], [8.0, 1.0, 1.0]):
        history = jnp.array([steps, [1.0] * 3, [1.0] * 3])
        np.testing.assert_allclose(linear(x, Delayed(weight, history), how), x, rtol=1e-6)


def test_a_history_drops_its_oldest_step_for_the_newest_and_lets_nothing_else_in():
    history, now = jnp.array([[4.0, 3.0, 2.0]] * 3), jnp.array([[1.0, 0, 0], [2.0, 0, 0], [0.5, 0, 0]])
    after = advanced({"a": history, "b": None}, {"a": now, "b": None})
    np.testing.assert_array_equal(after["a"], [[1.0, 4, 3], [2.0, 4, 3], [0.5, 4, 3]])
    assert after["b"] is None


def test_each_operand_s_magnitude_is_its_own():
    """Of x before it was rounded, of the weight, and of the gradient: for one operation, and for the experts'."""
    from dsv3_jax.fp8.linear import linear
    from dsv3_jax.fp8.precision import products

    how = products(config_of(fp8='{"scaling": "delayed", "amax_history": 2}').model, "q_a_proj")
    x, weight, dy = (jnp.asarray(np.random.default_rng(i).standard_normal((4, 4)) * 10.0**i, jnp.float32) for i in range(3))
    _, pull_back = jax.vjp(lambda w: linear(x, w, how), Delayed(weight, jnp.ones((3, 2))))
    expected = [float(jnp.abs(a).max()) for a in (x, weight, dy)]
    np.testing.assert_array_equal(pull_back(dy)[0].amax, np.stack([expected, [0, 0, 0]], axis=1).astype(np.float32))


def test_a_skipped_step_leaves_the_histories_as_they_were():
    config = config_of(fp8=DELAYED)
    state = training.init_state(config)
    state = state._replace(
        params={**state.params, "norm": state.params["norm"] * jnp.nan}, amax=jax.tree.map(lambda a: a + 3, state.amax)
    )
    after, metrics = stepped(config, state)
    assert bool(metrics["nonfinite"]) and int(after.skipped_total) == 1
    for amax in jax.tree.leaves(after.amax):
        np.testing.assert_array_equal(amax, np.full(amax.shape, 3))


@pytest.mark.slow
def test_the_largest_magnitude_of_all_micro_batches_is_remembered():
    whole, parts = (stepped(config_of(fp8='{"scaling": "delayed"}', micro_batch_size=m))[0].amax["moe_layers"] for m in (4, 1))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a[:, 1, 0], b[:, 1, 0])  # weights: the same in all
        np.testing.assert_allclose(a[:, 0, 0], b[:, 0, 0], rtol=0.2)  # inputs: those of the largest, up to rounding


def test_weights_and_histories_come_apart_as_they_were_put_together():
    params, history = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}, {"a": jnp.ones((3, 2)), "b": None}
    together = beside(params, history)
    assert isinstance(together["a"], Delayed) and together["b"] is params["b"]
    weights, amax = apart(together)
    assert weights["a"] is params["a"] and amax["a"] is history["a"] and amax["b"] is None


@pytest.mark.slow
@pytest.mark.parametrize("fp8", ["report", '{"scaling": "delayed"}'])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(fp8, tmp_path):
    config = config_of(fp8=fp8, steps=4, checkpoint_every=2, domain_bytes=60_000, eval_sequences=2)
    whole = train(config, tmp_path / "whole", header=False, progress=False)
    train(config, tmp_path / "parts", header=False, progress=False, step_limit=2)
    parts = train(config, tmp_path / "parts", resume=True, header=False, progress=False)
    assert not whole.interrupted and not parts.interrupted
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_init_ulps_moves_every_initial_parameter_to_the_next_number_above():
    plain, moved = (training.init_state(config_of(init_ulps=n)).params for n in (0, 1))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(b, np.nextafter(np.asarray(a), np.float32(np.inf)))
