"""Latent attention and its plain relatives against the float64 reference, at lengths of one query block and of several."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import causal_attention
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import attention, attention_spec, core_implementation
from dsv3_jax.model.rope import apply_rope, rope_tables, softmax_scale
from dsv3_jax.model.transformer import make_context
from oracles import checks_attention
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors


@pytest.mark.parametrize("kind", checks_attention.KINDS)
def test_every_kind_equals_the_reference(kind):
    checks_attention.check_attention_equals_the_reference(kind)


@pytest.mark.parametrize("kind", ["mla_yarn", "gqa"])
def test_packed_rows_longer_than_a_block_of_queries_equal_the_reference(kind):
    checks_attention.check_attention_equals_the_reference(kind, length=70, packed=True)


def naive_attention(params, x, segments, config):
    """The textbook formula for MLA with query latents, no blocks and no custom gradient."""
    n, latent = config.qk_nope_head_dim, config.kv_lora_rank
    length = x.shape[1]
    q = jnp.einsum("btc,chd->bhtd", rms_norm(x @ params["q_a_proj"], params["q_a_layernorm"], 1e-6), params["q_b_proj"])
    compressed = x @ params["kv_a_proj_with_mqa"]
    c_kv = rms_norm(compressed[..., :latent], params["kv_a_layernorm"], 1e-6)
    kv = jnp.einsum("btc,chd->bhtd", c_kv, params["kv_b_proj"])
    tables = rope_tables(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], x.shape[:2]), config)
    k_rope = apply_rope(compressed[:, None, :, latent:], *tables)
    scores = jnp.einsum("bhtc,bhsc->bhts", q[..., :n], kv[..., :n])
    scores += jnp.einsum("bhtc,bxsc->bhts", apply_rope(q[..., n:], *tables), k_rope)
    visible = jnp.tril(jnp.ones((length, length), bool))[None] & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores * softmax_scale(config), -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bhsw,hwd->btd", weights, kv[..., n:], params["o_proj"])


def test_gradients_equal_those_of_the_textbook_formula_over_several_blocks_and_documents():
    released = SMALL_CONFIG | {"rope_scaling": checks_attention.YARN}
    config = model_config(released)
    params, _ = from_checkpoint(random_tensors(released, seed=7), config)
    weights = {name: array[0] for name, array in params["moe_layers"]["self_attn"].items()}
    length = 70
    x, out = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(3).standard_normal((2, 1, length, 24)))
    segments = jnp.where(jnp.arange(length) < 30, 1, 2)[None, :].astype(jnp.int32)

    def ours(weights, x):
        context = make_context(jnp.ones_like(segments), config, cross_document=True)
        return (attention(weights, x, context.rope, segments, config) * out).sum()

    def textbook(weights, x):
        return (naive_attention(weights, x, segments, config) * out).sum()

    actual, expected = (quick_jit(jax.grad(f, argnums=(0, 1)))(weights, x) for f in (ours, textbook))
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        # Both float32, summed in another order: relative to the tensor's own norm.
        error = float(jnp.linalg.norm(a - e) / jnp.linalg.norm(e))
        assert error < 3e-6, (jax.tree_util.keystr(path), error)


def test_bfloat16_gradients_exist_on_this_machine_and_are_the_float32_ones_to_rounding():
    """Shapes that a matrix library takes, unlike those of a toy: its BF16 products are not all implemented on CPU."""
    shapes = [(2, 4, 1, 70, 24), (2, 4, 70, 24), (2, 4, 70, 16)]
    q, k, v = (0.5 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def loss(q, k, v):
        return jnp.square(causal_attention(q, k, v, None, 0.2).astype(jnp.float32)).sum()

    narrow = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    actual = quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(*narrow)
    expected = quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(*(a.astype(jnp.float32) for a in narrow))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        error = float(jnp.linalg.norm(a.astype(jnp.float32) - e) / jnp.linalg.norm(e))
        assert error < 1e-2, error  # a few roundings of 2^-9


def test_the_future_is_invisible():
    config = model_config(SMALL_CONFIG)
    params, _ = from_checkpoint(random_tensors(SMALL_CONFIG, seed=7), config)
    weights = {name: array[0] for name, array in params["moe_layers"]["self_attn"].items()}
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 6, 24)), jnp.float32)
    context = make_context(jnp.ones((1, 6), jnp.int32), config, cross_document=True)
    run = quick_jit(lambda x: attention(weights, x, context.rope, context.segments_BT, config))
    before, after = run(x), run(x.at[:, 4].add(1.0))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(np.asarray(before - after))[:, 4:].max() > 1e-3


def test_released_attention_has_its_exact_number_of_weights():
    spec = attention_spec(ModelConfig())
    assert sum(math.prod(s.shape) for s in spec.values()) == 187_107_328
    assert set(attention_spec(ModelConfig(attention="gqa", num_key_value_heads=8))) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_heads_wider_than_v3_s_have_no_kernel_on_gpus_by_themselves():
    """Blocks there are chosen for memories that V3's fill, and sides are powers of two: 160 takes the room of 256."""
    for width, rope, fits in ((128, 64, True), (96, 64, True), (192, 64, False), (160, 32, False)):
        config = replace(ModelConfig(), qk_nope_head_dim=width, qk_rope_head_dim=rope)
        assert core_implementation(config, "gpu") == ("pallas_gpu" if fits else "blockwise")
        assert core_implementation(config, "tpu") == "pallas_tpu"
        assert core_implementation(replace(config, attention_implementation="pallas_gpu"), "gpu") == "pallas_gpu"
    assert core_implementation(replace(ModelConfig(), attention="mha"), "tpu") == "blockwise"
