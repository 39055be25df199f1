"""Presets carry the published values of DeepSeek-V3 and its relatives."""

import dataclasses

import pytest

from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.training import schedules

NAMES = (
    "deepseek_v2_lite", "deepseek_v2", "moonlight_16b_a3b", "kimi_k2", "glm_4_7_flash", "deepseek_v3_671b",
)  # fmt: skip
PUBLISHED = {  # field -> value of each model of NAMES, from their released configurations
    "num_hidden_layers": (27, 60, 27, 61, 47, 61),
    "first_k_dense_replace": (1, 1, 1, 1, 1, 3),
    "hidden_size": (2048, 5120, 2048, 7168, 2048, 7168),
    "num_attention_heads": (16, 128, 16, 64, 20, 128),
    "q_lora_rank": (None, 1536, None, 1536, 768, 1536),
    "kv_lora_rank": (512,) * 6,
    "qk_rope_head_dim": (64,) * 6,
    "qk_nope_head_dim": (128, 128, 128, 128, 192, 128),
    "v_head_dim": (128, 128, 128, 128, 256, 128),
    "intermediate_size": (10944, 12288, 11264, 18432, 10240, 18432),
    "moe_intermediate_size": (1408, 1536, 1408, 2048, 1536, 2048),
    "n_routed_experts": (64, 160, 64, 384, 64, 256),
    "n_shared_experts": (2, 2, 2, 1, 1, 1),
    "num_experts_per_tok": (6, 6, 6, 8, 4, 8),
    "n_group": (1, 8, 1, 1, 1, 8),
    "topk_group": (1, 3, 1, 1, 1, 4),
    "scoring_func": ("softmax", "softmax", "sigmoid", "sigmoid", "sigmoid", "sigmoid"),
    "has_correction_bias": (False, False, True, True, True, True),
    "norm_topk_prob": (False, False, True, True, True, True),
    "routed_scaling_factor": (1.0, 16.0, 2.446, 2.827, 1.8, 2.5),
    "vocab_size": (102400, 102400, 163840, 163840, 154880, 129280),
    "rope_theta": (1e4, 1e4, 5e4, 5e4, 1e6, 1e4),
    "rms_norm_eps": (1e-6, 1e-6, 1e-5, 1e-6, 1e-5, 1e-6),
    "latent_norm_eps": (1e-6,) * 6,
    "num_nextn_predict_layers": (0, 0, 0, 0, 1, 1),
    "tie_word_embeddings": (False,) * 6,
}
YARN = {  # factor, original window, beta_fast, beta_slow, mscale, mscale_all_dim
    "deepseek_v2_lite": (40, 4096, 32, 1, 0.707, 0.707),
    "deepseek_v2": (40, 4096, 32, 1, 0.707, 0.707),
    "moonlight_16b_a3b": None,
    "kimi_k2": (32, 4096, 1, 1, 1, 1),
    "glm_4_7_flash": None,
    "deepseek_v3_671b": (40, 4096, 32, 1, 1, 1),
}


@pytest.mark.parametrize("field", PUBLISHED)
def test_released_presets_hold_the_published_values(field):
    assert tuple(getattr(preset(name).model, field) for name in NAMES) == PUBLISHED[field]


@pytest.mark.parametrize("name", NAMES)
def test_released_presets_hold_the_published_yarn_settings(name):
    scaling = preset(name).model.rope_scaling
    assert (scaling and dataclasses.astuple(scaling)[1:]) == YARN[name]


def test_deepseek_v3_preset_trains_by_the_published_recipe():
    train = preset("deepseek_v3_671b").train
    assert (train.learning_rate, train.learning_rate_min, train.learning_rate_final) == (2.2e-4, 2.2e-5, 7.3e-6)
    assert (train.warmup_steps, train.batch_size_start, train.batch_size, train.batch_ramp_tokens) == (2000, 3072, 15360, 469e9)
    assert (train.adam_b1, train.adam_b2, train.weight_decay, train.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (train.controller, train.bias_update_speed, train.bias_update_stop_tokens) == ("sign", 1e-3, 14.3e12)
    assert (train.mtp_loss_weight, train.mtp_loss_weight_late, train.mtp_late_tokens) == (0.3, 0.1, 10e12)
    assert preset("deepseek_v3_671b").model.initializer_range == 0.006


@pytest.mark.parametrize(("name", "seq_len", "sequences"), [("32k", 32768, 1920), ("128k", 131072, 480)])
def test_the_phases_of_the_extension_hold_the_published_values(name, seq_len, sequences):
    config = preset(f"deepseek_v3_671b_{name}")
    train, total = config.train, schedules.total_tokens(config)
    assert (config.data.seq_len, train.batch_size, train.batch_size_start) == (seq_len, sequences, sequences)
    assert schedules.total_steps(config) == 1000 and total == 62_914_560_000
    for tokens, step in ((0, 1), (total // 2, 500), (total - 1, 1000)):
        assert schedules.learning_rate(train, tokens, total, step) == 7.3e-6
        assert schedules.bias_update_speed(train, tokens, total) == 0
        assert schedules.mtp_loss_weight(train, tokens, total) == 0.1
    assert dataclasses.astuple(config.model.rope_scaling)[1:] == YARN["deepseek_v3_671b"]
    assert config.model == preset("deepseek_v3_671b").model
    assert config.data.shuffle_windows * seq_len == 4096 * 4096, "the host holds as many tokens as in pre-training"


def test_the_small_extension_keeps_the_published_ratios():
    phases = [preset(name) for name in ("needles", "needles_1k", "needles_4k")]
    assert [c.data.seq_len for c in phases] == [256, 1024, 4096]
    assert len({c.train.batch_size * c.data.seq_len for c in phases}) == 1
    assert phases[0].model.rope_scaling is None and phases[0].data.retrieval_bytes > 0
    yarn = phases[1].model.rope_scaling
    assert yarn == phases[2].model.rope_scaling and yarn.original_max_position_embeddings == 256
    assert yarn.factor / (4096 / 256) == 40 / (131072 / 4096)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'huge'; expected one of deepseek_v3_671b, .*tiny"):
        preset("huge")


@pytest.mark.parametrize("name", ["tiny", "quick", "bench", "mid"])
def test_small_presets_keep_every_mechanism_of_the_router(name):
    model = PRESETS[name].model
    assert 1 < model.topk_group < model.n_group and model.n_shared_experts and model.q_lora_rank and model.has_correction_bias
