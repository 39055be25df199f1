"""Rotary embedding: YaRN's known frequencies, the interleaved convention, and its relation to the half-rotated one."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model.rope import apply_rope, rope_frequencies, rope_tables, softmax_scale, yarn_mscale
from dsv3_jax.presets import preset
from oracles import checks_attention, numpy_attention
from oracles.random_checkpoint import SMALL_CONFIG


def test_yarn_frequencies_are_the_known_ones():
    checks_attention.check_known_frequencies()


def test_softmax_scales_are_the_known_ones_with_mscale_squared():
    checks_attention.check_known_softmax_scales()


def test_rotation_equals_the_reference_near_and_far():
    checks_attention.check_rotation_equals_the_reference()


def test_mscales_of_the_relatives_are_the_known_ones():
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1.26080, abs=5e-6)
    assert yarn_mscale(32.0, 1.0) == pytest.approx(1.34657, abs=5e-6)
    assert yarn_mscale(64.0, 1.0) == pytest.approx(1.41589, abs=5e-6)
    assert softmax_scale(preset("deepseek_v2_lite").model) == pytest.approx(0.1147214, abs=5e-8)


@settings(max_examples=60)
@given(
    st.sampled_from([2, 4, 8, 64]), st.floats(100.0, 1e6), st.floats(1.0, 64.0), st.integers(16, 8192),
    st.floats(8.0, 64.0), st.floats(0.5, 4.0), st.floats(0.0, 2.0), st.floats(0.0, 2.0),
)  # fmt: skip
def test_yarn_equals_the_reference_at_any_setting(dim, theta, factor, window, fast, slow, mscale, mscale_all):
    yarn = dict(type="yarn", factor=factor, original_max_position_embeddings=window, beta_fast=fast, beta_slow=slow,
                mscale=mscale, mscale_all_dim=mscale_all)  # fmt: skip
    config = ModelConfig(qk_rope_head_dim=dim, rope_theta=theta, rope_scaling=RopeScaling(**yarn))
    reference = SMALL_CONFIG | {"qk_nope_head_dim": 128, "qk_rope_head_dim": dim, "rope_theta": theta, "rope_scaling": yarn}
    np.testing.assert_allclose(rope_frequencies(config), numpy_attention.rope_frequencies(reference), rtol=1e-13)
    assert softmax_scale(config) == pytest.approx(numpy_attention.softmax_scale(reference), rel=1e-13)
    cos, _ = rope_tables(jnp.zeros((1, 1), jnp.int32), config)
    assert float(cos[0, 0, 0]) == pytest.approx(numpy_attention.rope_multiplier(reference), rel=1e-6)


def test_frequencies_where_both_betas_are_equal_are_a_step_not_a_division_by_zero():
    assert np.isfinite(rope_frequencies(preset("kimi_k2").model)).all()
    ratio = rope_frequencies(preset("kimi_k2").model) * 50000.0 ** (np.arange(0, 64, 2) / 64)
    assert ratio[19] == pytest.approx(1.0) and ratio[20] == pytest.approx(1 / 32)  # corr(1) = 19.165: low 19, high 20


def test_interleaved_rotation_gives_the_scores_of_half_rotation_after_a_permutation_and_only_then():
    dim, length = 8, 12
    config = ModelConfig(qk_rope_head_dim=dim, rope_scaling=None)
    q, k = np.random.default_rng(2).standard_normal((2, 1, 1, length, dim)).astype(np.float32)
    cos, sin = rope_tables(jnp.arange(length, dtype=jnp.int32)[None, :], config)
    q_rotated, k_rotated = apply_rope(jnp.asarray(q), cos, sin), apply_rope(jnp.asarray(k), cos, sin)
    interleaved = np.einsum("bhtc,bhsc->ts", q_rotated, k_rotated)

    def half_rotated(x):
        left, right = x[..., : dim // 2], x[..., dim // 2 :]
        c, s = np.asarray(cos)[:, None], np.asarray(sin)[:, None]
        return np.concatenate([left * c - right * s, left * s + right * c], axis=-1)

    permutation = [*range(0, dim, 2), *range(1, dim, 2)]
    permuted = np.einsum("bhtc,bhsc->ts", half_rotated(q[..., permutation]), half_rotated(k[..., permutation]))
    np.testing.assert_allclose(interleaved, permuted, rtol=0, atol=1e-5)
    without = np.einsum("bhtc,bhsc->ts", half_rotated(q), half_rotated(k))
    assert np.abs(interleaved - without).max() > 0.1


def test_rotation_keeps_the_dtype_and_computes_in_float32():
    config = ModelConfig(qk_rope_head_dim=4, rope_scaling=None)
    tables = rope_tables(jnp.asarray([[3]], jnp.int32), config)
    x = jnp.asarray([[[[1.0, 2.0, -3.0, 0.5]]]], jnp.bfloat16)
    rotated = apply_rope(x, *tables)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotated, apply_rope(x.astype(jnp.float32), *tables).astype(jnp.bfloat16))
