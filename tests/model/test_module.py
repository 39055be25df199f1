"""The Linen shell: what it initialises, which axes it names, and that it only calls the pure functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.module import DeepSeekV3, abstract_variables, init_variables, logical_axes, model_spec
from dsv3_jax.model.mtp import mtp_forward
from dsv3_jax.model.transformer import forward, make_context
from dsv3_jax.presets import preset
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors

TINY = preset("tiny").model


def test_matrices_start_at_the_configured_spread_gains_at_one_and_the_bias_at_zero():
    params, bias = init_variables(TINY, seed=3)
    gains, matrices = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if "norm" in path[-1].key:
            gains += 1
            np.testing.assert_array_equal(leaf, np.ones(leaf.shape))
        else:
            matrices += 1
            # The spread of n normal numbers is known to 1 / sqrt(2 n); five of those.
            expected = pytest.approx(TINY.initializer_range, rel=5 / (2 * leaf.size) ** 0.5)
            assert float(leaf.std()) == expected, jax.tree_util.keystr(path)
    # Per block 2 + 2 gains; 1 final; MTP's enorm, hnorm and norm. Matrices: 5 of attention, 3 of a dense or 7 of an MoE FFN.
    assert (gains, matrices) == (3 * 4 + 1 + 3, 3 * 5 + 3 + 2 * 7 + 2 + 1)
    np.testing.assert_array_equal(bias, np.zeros((3, 16)))


def test_seeds_differ_and_repeat():
    small = dataclasses.replace(TINY, num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    a, b, c = (init_variables(small, seed=seed).params["embed_tokens"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (np.asarray(a) != np.asarray(c)).mean() > 0.99


def test_abstract_variables_of_the_released_model_allocate_nothing_and_have_its_shapes():
    params, bias = abstract_variables(preset("deepseek_v3_671b").model)
    assert bias.shape == (59, 256) and bias.dtype == jnp.float32
    assert params["moe_layers"]["mlp"]["experts"]["down_proj"].shape == (58, 256, 2048, 7168)
    assert params["dense_layers"]["self_attn"]["q_b_proj"].shape == (3, 1536, 128, 192)
    assert params["mtp"]["eh_proj"].shape == (1, 2 * 7168, 7168)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def test_every_dimension_of_every_parameter_has_a_logical_axis():
    params, _ = abstract_variables(TINY)
    axes = logical_axes(TINY)
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(axes, is_leaf=lambda s: s is None), strict=True
    ):
        assert len(spec) == leaf.ndim and all(isinstance(name, str) for name in spec), jax.tree_util.keystr(path)
        stacked = path[0].key in ("dense_layers", "moe_layers", "mtp")
        assert (spec[0] == "layers") == stacked, jax.tree_util.keystr(path)


def test_parameters_have_the_dtype_that_is_asked_for_and_the_bias_stays_float32():
    params, bias = abstract_variables(dataclasses.replace(TINY, param_dtype="bfloat16"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"} and bias.dtype == jnp.float32


def test_tied_model_has_no_head_and_a_dense_one_no_experts():
    assert "lm_head" not in model_spec(dataclasses.replace(TINY, tie_word_embeddings=True))
    dense = dataclasses.replace(TINY, first_k_dense_replace=3, num_nextn_predict_layers=0)
    assert set(model_spec(dense)) == {"embed_tokens", "dense_layers", "norm", "lm_head"}


def test_the_shell_returns_what_the_pure_functions_return():
    released = SMALL_CONFIG | {"num_nextn_predict_layers": 1}
    config = model_config(released)
    params, bias = from_checkpoint(random_tensors(released, seed=2), config)
    tokens = jnp.asarray([[3, 7, 1, 9, 4]], jnp.int32)
    segments = jnp.asarray([[1, 1, 2, 2, 2]], jnp.int32)

    def pure(params, bias):
        context = make_context(segments, config, cross_document=False)
        hidden = forward(params, bias, tokens, context, config)
        return hidden, mtp_forward(params, bias, tokens, hidden, context, config)

    def shell(params, bias):
        variables = {"params": params, "balance": {"bias": bias}}
        return DeepSeekV3(config).apply(variables, tokens, segments, cross_document=False)

    ours, theirs = (jax.tree.leaves(quick_jit(run)(params, bias)) for run in (pure, shell))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
