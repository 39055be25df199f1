"""A few training steps on whatever JAX is installed: the public path from preset to metrics, compiled, with evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.count import count_parameters
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training.step import Hyper, init_state, make_eval_step, make_train_step


def test_a_small_model_learns_to_repeat_and_its_bias_moves():
    config = override(preset("tiny"), {"vocab_size": 32, "num_hidden_layers": 2, "batch_size": 4, "batch_size_start": 4,
                                       "micro_batch_size": 2, "remat": "report", "seq_len": 12})  # fmt: skip
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 32, 4).astype(np.int32)
    tokens = np.broadcast_to(np.tile(pattern, 4)[:13], (2, 2, 13)).copy()
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "domain_ids": np.zeros_like(tokens)}
    batch = {name: jnp.asarray(a) for name, a in batch.items()}
    state, step = init_state(config), make_train_step(config, 1)
    before = make_eval_step(config, 1)
    untrained = before(state.params, state.bias, batch)
    assert np.isclose(float(untrained["domain_loss_sum"][0]) / 48, np.log(32), atol=0.3)  # knows nothing yet
    hyper = Hyper(jnp.float32(3e-3), jnp.float32(1e-3), jnp.float32(0.3))
    for _ in range(30):
        state, metrics = step(state, batch, hyper)
    trained = before(state.params, state.bias, batch)
    assert float(trained["domain_loss_sum"][0]) < 0.3 * float(untrained["domain_loss_sum"][0])
    assert int(state.step) == 30 and not bool(metrics["nonfinite"]) and bool((state.bias != 0).any())
    assert metrics["load"].dtype == jnp.int32 and int(metrics["load"][0].sum()) == 48 * 4


def test_released_model_is_counted_without_allocating_it():
    assert count_parameters(preset("deepseek_v3_671b").model).total == 671_026_419_200


def test_bfloat16_steps_are_finite():
    config = override(preset("tiny"), {"vocab_size": 32, "num_hidden_layers": 2, "batch_size": 2, "batch_size_start": 2,
                                       "param_dtype": "bfloat16", "compute_dtype": "bfloat16", "moment_dtype": "bfloat16",
                                       "seq_len": 12})  # fmt: skip
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, experts_implementation="dense"))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (1, 2, 13)), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "domain_ids": jnp.zeros_like(tokens)}
    state, metrics = make_train_step(config, 1)(init_state(config), batch, Hyper(*map(jnp.float32, (1e-3, 1e-3, 0.3))))
    assert np.isfinite(float(metrics["loss"])) and not bool(metrics["nonfinite"])
    assert {str(p.dtype) for p in jax.tree.leaves(state.params)} == {"bfloat16"} and state.bias.dtype == jnp.float32
