"""Components, stored tensors and cached elements against published counts and an inventory made from tensor names."""

import math
from dataclasses import replace

import pytest

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.count import count_parameters
from dsv3_jax.planner.parameters import (
    cache_bytes_per_token,
    cache_elements,
    component_counts,
    quantised_bytes,
    stored_checkpoint,
)
from dsv3_jax.presets import PRESETS, preset

V3 = preset("deepseek_v3_671b")


@pytest.mark.parametrize("name", PRESETS)
def test_components_add_up_to_the_whole_count(name):
    counts, whole = component_counts(preset(name)), count_parameters(preset(name).model)
    main = [count for key, count in counts.items() if key != "mtp"]
    assert sum(c.total for c in main) == whole.total
    assert sum(c.active for c in main) == whole.active_with_head
    assert counts["mtp"] == (whole.mtp, whole.mtp_active)


def test_components_of_v3_are_the_published_ones():
    counts = component_counts(V3)
    assert counts["attention"].total == 11_413_547_008
    assert counts["routed_experts"] == (653_908_770_816, 20_434_649_088)
    assert counts["shared_experts"].total == 2_554_331_136
    assert counts["router"].total == 106_430_464 + 14_848
    assert counts["norms"].total == 874_496 + 7_168
    assert counts["embedding"] == (926_679_040, 0)


def test_a_tied_embedding_is_stored_once_and_active_as_the_head():
    counts = component_counts(replace(V3, model=replace(V3.model, tie_word_embeddings=True)))
    assert counts["head"].total == 0 and counts["embedding"].active == counts["embedding"].total == 926_679_040


def inventory(m: ModelConfig):
    """(name, shape as stored, whether in FP8) of every tensor, after the released checkpoint's names."""
    heads, qk = m.num_attention_heads, m.qk_nope_head_dim + m.qk_rope_head_dim
    for layer in range(m.num_hidden_layers + m.num_nextn_predict_layers):
        yield from ((norm, (m.hidden_size,), False) for norm in ("input_layernorm", "post_attention_layernorm"))
        if m.q_lora_rank is None:
            yield "q_proj", (heads * qk, m.hidden_size), True
        else:
            yield "q_a_proj", (m.q_lora_rank, m.hidden_size), True
            yield "q_a_layernorm", (m.q_lora_rank,), False
            yield "q_b_proj", (heads * qk, m.q_lora_rank), True
        yield "kv_a_proj_with_mqa", (m.kv_lora_rank + m.qk_rope_head_dim, m.hidden_size), True
        yield "kv_a_layernorm", (m.kv_lora_rank,), False
        yield "kv_b_proj", (heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank), True
        yield "o_proj", (m.hidden_size, heads * m.v_head_dim), True
        mlps = [m.intermediate_size]
        if layer >= m.first_k_dense_replace:
            shared = [m.n_shared_experts * m.moe_intermediate_size] if m.n_shared_experts else []
            mlps = [m.moe_intermediate_size] * m.n_routed_experts + shared
            yield "gate", (m.n_routed_experts, m.hidden_size), False
            if m.topk_method == "noaux_tc":
                yield "e_score_correction_bias", (m.n_routed_experts,), False
        for width in mlps:
            yield from (("up", (width, m.hidden_size), True),) * 2
            yield "down", (m.hidden_size, width), True
        if layer >= m.num_hidden_layers:
            yield from ((norm, (m.hidden_size,), False) for norm in ("enorm", "hnorm", "shared_head.norm"))
            yield "eh_proj", (m.hidden_size, 2 * m.hidden_size), False
    for _ in range(1 + m.num_nextn_predict_layers):
        yield from ((name, (m.vocab_size, m.hidden_size), False) for name in ("embed_tokens", "lm_head"))
    yield "norm", (m.hidden_size,), False


@pytest.mark.parametrize("name", PRESETS)
def test_a_stored_checkpoint_is_its_tensors_one_by_one(name):
    tensors = list(inventory(preset(name).model))
    grids = [math.ceil(shape[0] / 128) * math.ceil(shape[1] / 128) for _, shape, fp8 in tensors if fp8]
    biases = sum(math.prod(shape) for name, shape, _ in tensors if name == "e_score_correction_bias")
    stored = stored_checkpoint(preset(name))
    assert stored.fp8 == sum(math.prod(shape) for _, shape, fp8 in tensors if fp8)
    assert stored.bf16 == sum(math.prod(shape) for _, shape, fp8 in tensors if not fp8) - biases
    assert (stored.scales, stored.biases, stored.tensors) == (sum(grids), biases, len(tensors) + len(grids))


def test_v3_is_stored_to_the_published_byte():
    stored = stored_checkpoint(V3)
    assert (stored.fp8, stored.bf16, stored.scales, stored.biases) == (680_571_043_840, 3_918_786_560, 41_540_496, 15_104)
    assert (stored.elements, stored.bytes, stored.tensors) == (684_531_386_000, 688_574_839_360, 91_991)


def test_int4_weighs_half_a_byte_and_its_share_of_a_scale():
    assert quantised_bytes(count_parameters(V3.model).total, 4, 32, 16) / 1e9 == pytest.approx(377, abs=0.5)
    assert quantised_bytes(1024, 8, 128, 32) == 1024 + 8 * 4


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [("deepseek_v3_671b", 70_272), ("deepseek_v2", 69_120), ("deepseek_v2_lite", 31_104), ("kimi_k2", 70_272), ("tiny", 144)],
)
def test_a_token_caches_its_latent_in_every_layer(name, bytes_):
    assert cache_bytes_per_token(preset(name).model) == bytes_


@pytest.mark.parametrize(("layers", "bytes_"), [(80, 327_680), (126, 516_096)], ids=["Qwen2.5-72B", "LLaMA-3.1-405B"])
def test_other_attentions_cache_as_published_of_other_models(layers, bytes_):
    heads = dict(qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, num_attention_heads=64, num_key_value_heads=8)
    assert cache_bytes_per_token(ModelConfig(attention="gqa", num_hidden_layers=layers, **heads)) == bytes_


def test_mla_compresses_as_published():
    mla = cache_elements(V3.model, "mla")
    assert mla == 576
    assert cache_elements(V3.model, "mha") / mla == pytest.approx(56.9, abs=0.05)
    assert cache_elements(V3.model, "gqa", 8) / mla == pytest.approx(3.56, abs=0.005)
    assert cache_elements(V3.model, "mqa") == 256
    assert cache_elements(Config(model=replace(V3.model, num_attention_heads=16)).model, "mha") == 16 * 256
