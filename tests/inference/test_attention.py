"""Attention over the cache equals attention over the whole sequence, of every kind, absorbed or not, wherever it begins."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import attention
from dsv3_jax.inference.attention import cache_width, cached_attention, views, visible_BTS, written
from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.model import rope
from oracles import faults, numpy_attention
from oracles.decoding import tiny

SIZE, CHUNK, BATCH = 25, 5, 2
ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_attention_heads": 4}
KINDS = {
    "mla": {"yarn": True},
    "plain query": {"q_lora_rank": None},
    "mha": {"attention": "mha", "yarn": True},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa": {"attention": "mqa"},
}
# Float32 against float64, sums over 24 numbers near one.
TOLERANCE = 2e-5
# No number of a sequence; zero times it is zero, and times a weight it does not overflow.
GARBAGE = 1e30


@pytest.fixture(autouse=True)
def several_views(monkeypatch):
    """Of so small a cache too, a step looks at a part."""
    monkeypatch.setattr(attention, "SMALLEST_VIEW", 17)


def model(kind):
    return tiny(**ONE_LAYER, **KINDS[kind])


@functools.cache
def whole(kind):
    """Inputs of two sequences, and what attention adds to them by the reference."""
    released, tensors = model(kind)[:2]
    x_BTD = np.random.default_rng(1).standard_normal((BATCH, SIZE, released["hidden_size"]))
    mask, positions = numpy_attention.attention_mask(SIZE), np.arange(SIZE)
    rows = [numpy_attention.attention(x, tensors, "model.layers.0.self_attn.", released, positions, mask) for x in x_BTD]
    return x_BTD, np.stack(rows)


@functools.cache
def program(kind, absorbed):
    config, params = model(kind).config, model(kind).model.layers[0][0]["self_attn"]

    def run(x, rows, start_B):
        tables = rope.rope_tables(start_B[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], config)
        return cached_attention(params, x, rows, start_B, tables, config, absorbed=absorbed)

    return jax.jit(run)


def part(values_BTD, start_B, length):
    return np.stack([row[s : s + length] for row, s in zip(values_BTD, start_B, strict=True)])


@functools.cache
def filled(kind):
    """The cache after the whole of both sequences, and what came out, chunk by chunk."""
    x, run = whole(kind)[0].astype(np.float32), program(kind, False)
    rows, outs = np.full((BATCH, SIZE, cache_width(model(kind).config)), GARBAGE, np.float32), []
    for start in range(0, SIZE, CHUNK):
        out, rows = run(x[:, start : start + CHUNK], rows, np.full(BATCH, start, np.int32))
        outs.append(out)
    return np.asarray(rows), np.concatenate(outs, axis=1)


# Of each kind of program one is fast.
SLOW_KINDS = ("mha", "mqa")


def kinds_of(cases):
    """Parameters; those of the slow kinds are marked so."""
    return [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in SLOW_KINDS else []) for case in cases]


@pytest.mark.parametrize("kind", kinds_of((kind,) for kind in KINDS))
def test_chunks_one_after_the_other_equal_the_whole(kind):
    np.testing.assert_allclose(filled(kind)[1], whole(kind)[1], atol=TOLERANCE)


def cases(kind):
    """(absorbed, new tokens)"""
    return [(True, 1), (True, CHUNK), (False, 1), (False, CHUNK)] if kind == "mla" else [(True, 1), (False, CHUNK)]


@pytest.mark.parametrize(("kind", "absorbed", "length"), kinds_of((kind, *case) for kind in KINDS for case in cases(kind)))
@settings(max_examples=8)
@given(data=st.data())
def test_tokens_behind_a_cache_get_what_the_whole_sequence_gives_them(kind, absorbed, length, data):
    """Sequences of different lengths; what lies beyond each is garbage."""
    start_B = np.array([data.draw(st.integers(0, SIZE - length)) for _ in range(BATCH)], np.int32)
    x_BTD, expected = whole(kind)
    beyond = np.arange(SIZE)[None, :, None] >= start_B[:, None, None]
    rows = np.where(beyond, np.float32(GARBAGE), filled(kind)[0])
    out, new_rows = program(kind, absorbed)(part(x_BTD, start_B, length).astype(np.float32), rows, start_B)
    np.testing.assert_allclose(out, part(expected, start_B, length), atol=TOLERANCE)
    kept = np.arange(SIZE)[None, :, None] < start_B[:, None, None] + length
    np.testing.assert_allclose(np.where(kept, new_rows, 0), np.where(kept, filled(kind)[0], 0), atol=TOLERANCE)
    assert (np.asarray(new_rows)[np.broadcast_to(~kept, rows.shape)] == np.float32(GARBAGE)).all()  # nothing written there


def test_the_cache_holds_the_normed_latent_and_one_rotated_key():
    """512 + 64 numbers of a token in the released shape, worked out in NumPy in the small one."""
    released, tensors, config, _ = model("mla")
    x_BTD, prefix = whole("mla")[0], "model.layers.0.self_attn."
    latent = released["kv_lora_rank"]
    assert cache_width(config) == latent + released["qk_rope_head_dim"] and cache_width(ModelConfig()) == 512 + 64
    for x_TD, rows in zip(x_BTD, filled("mla")[0], strict=True):
        compressed = x_TD @ tensors[f"{prefix}kv_a_proj_with_mqa.weight"].T
        c_kv = compressed[:, :latent] / np.sqrt(np.mean(compressed[:, :latent] ** 2, axis=-1, keepdims=True) + 1e-6)
        k_rope = numpy_attention.rotate(compressed[:, latent:], np.arange(SIZE), numpy_attention.rope_frequencies(released))
        np.testing.assert_allclose(rows[:, :latent], c_kv * tensors[f"{prefix}kv_a_layernorm.weight"], atol=TOLERANCE)
        np.testing.assert_allclose(rows[:, latent:], k_rope, atol=TOLERANCE)


def test_the_other_kinds_hold_keys_and_values_of_their_heads():
    assert cache_width(ModelConfig(attention="mha")) == 128 * (192 + 128)
    assert cache_width(ModelConfig(attention="mqa")) == 192 + 128
    gqa = ModelConfig(attention="gqa", num_key_value_heads=8, qk_nope_head_dim=64, qk_rope_head_dim=64)
    assert cache_width(gqa) == 2048


def test_bfloat16_rounds_but_does_not_drift(monkeypatch):
    """Absorbed in bfloat16 against float64: relative to the norm, 2^-8 a rounding and a few of them."""
    monkeypatch.setattr(attention, "SMALLEST_VIEW", SIZE)
    config, params = model("mla").config, model("mla").model.layers[0][0]["self_attn"]
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    rows, start_B = jnp.asarray(filled("mla")[0], jnp.bfloat16), jnp.array([7, 21], jnp.int32)
    x = jnp.asarray(part(whole("mla")[0], start_B, 1), jnp.bfloat16)
    tables = rope.rope_tables(start_B[:, None], config)
    out, _ = jax.jit(functools.partial(cached_attention, config=config, absorbed=True))(params, x, rows, start_B, tables)
    assert out.dtype == jnp.bfloat16
    expected = part(whole("mla")[1], np.asarray(start_B), 1)
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert 0 < error < 2e-2


@settings(max_examples=50)
@given(st.integers(1, 3000))
def test_views_grow_by_at_most_half_and_end_with_the_whole(size):
    steps = views(size)
    assert steps[-1] == size and steps == sorted(set(steps))
    assert all(after <= 1.5 * before for before, after in zip(steps, steps[1:], strict=False))


@settings(max_examples=20)
@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_new_rows_lie_where_each_sequence_goes_on(first, second, dtype):
    rows, new = np.zeros((2, 9, 2)), np.arange(1.0, 13.0).reshape(2, 3, 2)
    got = written(jnp.asarray(rows, dtype), jnp.asarray(new, dtype), jnp.array([first, second], jnp.int32))
    rows[0, first : first + 3], rows[1, second : second + 3] = new
    assert got.dtype == dtype and (np.asarray(got, np.float64) == rows).all()


def test_a_query_sees_rows_up_to_its_own():
    visible = np.asarray(visible_BTS(jnp.array([0, 2], jnp.int32), 2, 5)).astype(int).tolist()
    assert visible == [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]


# Bugs that other implementations shipped, on the way through the cache: the comparison above must fail.
FAULTS = {
    "mscale missing": ("softmax_scale", faults.scale_without_mscale),
    "mscale not squared": ("softmax_scale", faults.scale_with_mscale_once),
    "halves rotated": ("apply_rope", faults.half_rotated),
    "position of the query missing": ("apply_rope", lambda x, cos, sin: x),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_of_rotation_or_scale_shows_in_the_absorbed_step(fault, monkeypatch):
    (x_BTD, expected), rows = whole("mla"), filled("mla")[0]  # the cache is sound, the step is not
    monkeypatch.setattr(attention, "SMALLEST_VIEW", SIZE)
    if fault is not None:
        monkeypatch.setattr(attention, *FAULTS[fault])
    start_B = np.array([11, 23], np.int32)
    out, _ = program.__wrapped__("mla", True)(part(x_BTD, start_B, 1).astype(np.float32), rows, start_B)
    wrong = np.abs(np.asarray(out) - part(expected, start_B, 1)).max()
    assert wrong < TOLERANCE if fault is None else wrong > 1e-3


@pytest.mark.parametrize("how", ["pallas_tpu:interpret", "pallas_gpu:interpret"])
@pytest.mark.parametrize("length", [1, CHUNK])
def test_the_kernel_sees_of_a_stack_s_caches_one_layer_s_rows_and_of_them_what_is_written(how, length):
    """Wider rows than the model's, as TPUs have them; other layers and what lies beyond are garbage."""
    config = replace(model("mla").config, decode_implementation=how)
    params = model("mla").model.layers[0][0]["self_attn"]
    x_BTD, expected = whole("mla")
    start_B, width = np.array([3, SIZE - length], np.int32), cache_width(config)
    stack = np.full((3, BATCH, SIZE, width + 8), GARBAGE, np.float32)
    stack[1, :, :, :width] = np.where(np.arange(SIZE)[None, :, None] < start_B[:, None, None], filled("mla")[0], GARBAGE)

    @jax.jit
    def run(x, rows, start_B):
        tables = rope.rope_tables(start_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :], config)
        return cached_attention(params, x, rows, start_B, tables, config, absorbed=True, layer=jnp.int32(1))

    out, new_rows = run(part(x_BTD, start_B, length).astype(np.float32), stack, start_B)
    np.testing.assert_allclose(out, part(expected, start_B, length), atol=TOLERANCE)
    assert np.all(np.asarray(new_rows)[[0, 2]] == np.float32(GARBAGE))


@pytest.mark.parametrize("how", ["pallas_tpu:interpret", pytest.param("pallas_gpu:interpret", marks=pytest.mark.slow)])
def test_a_prompt_s_beginning_goes_through_the_kernel_of_training(how, monkeypatch):
    called = []
    monkeypatch.setattr(attention, "mla_attention", lambda *a, **k: called.append(k) or mla_attention(*a, **k))
    config = replace(model("mla").config, attention_implementation=how)
    params, (x_BTD, expected) = model("mla").model.layers[0][0]["self_attn"], whole("mla")

    @jax.jit
    def run(x, rows, start_B):
        tables = rope.rope_tables(start_B[:, None] + jnp.arange(CHUNK, dtype=jnp.int32)[None, :], config)
        return cached_attention(params, x, rows, start_B, tables, config, absorbed=False)

    start_B, rows = np.zeros(BATCH, np.int32), np.full((BATCH, SIZE, cache_width(config)), GARBAGE, np.float32)
    out, _ = run(part(x_BTD, start_B, CHUNK).astype(np.float32), rows, start_B)
    np.testing.assert_allclose(out, part(expected, start_B, CHUNK), atol=TOLERANCE)
    assert called[0]["implementation"] == how


def test_a_kernel_s_cache_has_whole_tiles_of_a_tpu_s_memory():
    assert attention.cache_shape(ModelConfig(), 2, 100, "tpu") == (2, 112, 640)
    assert (
        attention.cache_shape(ModelConfig(), 2, 100, "gpu")
        == attention.cache_shape(ModelConfig(), 2, 100, "cpu")
        == (2, 100, 576)
    )
    assert attention.cache_shape(ModelConfig(decode_implementation="views"), 2, 100, "tpu") == (2, 100, 576)
    assert attention.cache_shape(ModelConfig(attention="mqa"), 2, 100, "tpu") == (2, 100, 192 + 128)
