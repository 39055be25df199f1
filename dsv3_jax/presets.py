"""Presets: DeepSeek-V3 as released, its relatives, and sizes that train on a laptop [§4.2].

A released preset carries the released YaRN window. To pre-train at 4K as the report does, before the extension of §4.3,
set `rope_scaling=null`; then `deepseek_v3_671b_32k` begins with that run's weights, and `deepseek_v3_671b_128k` with its.
"""

from dataclasses import replace
from typing import Any

from dsv3_jax.config import Config, DataConfig, ModelConfig, RopeScaling, TrainConfig

_NO_BIAS: dict[str, Any] = dict(scoring_func="softmax", norm_topk_prob=False, group_score_topk=1)
_V2_YARN = RopeScaling(mscale=0.707, mscale_all_dim=0.707)

DEEPSEEK_V3_671B = ModelConfig()

DEEPSEEK_V2 = ModelConfig(
    vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
    first_k_dense_replace=1, n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6, n_group=8, topk_group=3,
    topk_method="group_limited_greedy", routed_scaling_factor=16.0, rope_scaling=_V2_YARN, num_nextn_predict_layers=0,
    **_NO_BIAS,
)  # fmt: skip

DEEPSEEK_V2_LITE = ModelConfig(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
    first_k_dense_replace=1, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, n_routed_experts=64,
    n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0,
    rope_scaling=_V2_YARN, num_nextn_predict_layers=0, **_NO_BIAS,
)  # fmt: skip

MOONLIGHT_16B_A3B = ModelConfig(
    vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408, num_hidden_layers=27,
    first_k_dense_replace=1, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, n_routed_experts=64,
    n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1, routed_scaling_factor=2.446, rope_theta=50000.0,
    rope_scaling=None, max_position_embeddings=8192, rms_norm_eps=1e-5, num_nextn_predict_layers=0,
)  # fmt: skip

KIMI_K2 = ModelConfig(
    vocab_size=163840, num_attention_heads=64, num_key_value_heads=64, first_k_dense_replace=1, n_routed_experts=384,
    n_group=1, topk_group=1, routed_scaling_factor=2.827, rope_theta=50000.0,
    rope_scaling=RopeScaling(factor=32.0, beta_fast=1.0, beta_slow=1.0), max_position_embeddings=131072,
    num_nextn_predict_layers=0,
)  # fmt: skip

GLM_4_7_FLASH = ModelConfig(
    vocab_size=154880, hidden_size=2048, intermediate_size=10240, moe_intermediate_size=1536, num_hidden_layers=47,
    first_k_dense_replace=1, num_attention_heads=20, num_key_value_heads=20, q_lora_rank=768, qk_nope_head_dim=192,
    v_head_dim=256, n_routed_experts=64, num_experts_per_tok=4, n_group=1, topk_group=1, routed_scaling_factor=1.8,
    rope_theta=1_000_000.0, rope_scaling=None, max_position_embeddings=202752, rms_norm_eps=1e-5,
)  # fmt: skip


def extended(config: Config, seq_len: int, rope_scaling: RopeScaling, steps: int) -> Config:
    """A phase of the long-context extension [§4.3] of the run `config`; it begins with that run's weights or with a phase's.

    As published: YaRN, longer sequences with as many tokens a step as before, at the constant rate with which pre-training
    ends. Not disclosed is whether that rate is warmed up (here it is not), and what else carries over: here router bias and MTP
    weight stay as at the end of pre-training, at speed 0 and the late weight.
    """
    train, data = config.train, config.data
    rate, sequences = train.learning_rate_final, max(1, train.batch_size * data.seq_len // seq_len)
    return replace(
        config,
        model=replace(config.model, rope_scaling=rope_scaling),
        train=replace(
            train, steps=steps, batch_size=sequences, batch_size_start=sequences, micro_batch_size=None, warmup_steps=0,
            learning_rate=rate, learning_rate_min=rate, bias_update_speed=0.0, mtp_loss_weight=train.mtp_loss_weight_late,
        ),
        # as many tokens are shuffled together as before, which is what the host has memory for
        data=replace(data, seq_len=seq_len, shuffle_windows=max(1, data.shuffle_windows * data.seq_len // seq_len)),
    )  # fmt: skip


# For tests, ablations and laptops: every mechanism of V3, small.
_SMALL: dict[str, Any] = dict(rope_scaling=None, max_position_embeddings=4096, compute_dtype="float32", remat="none")

TINY = ModelConfig(
    vocab_size=1024, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
    topk_group=2, initializer_range=0.05, **_SMALL,
)  # fmt: skip

QUICK = ModelConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=4,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=48,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
    topk_group=2, initializer_range=0.05, **_SMALL,
)  # fmt: skip

# Learns to find needles in minutes: see `experiments.extend`. The rotary base is to the window of 256 as 10,000 is to 4,096.
NEEDLES = ModelConfig(
    vocab_size=768, hidden_size=64, intermediate_size=192, moe_intermediate_size=64, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=64,
    qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=24, rope_theta=625.0, n_routed_experts=8, num_experts_per_tok=2,
    n_group=4, topk_group=2, num_nextn_predict_layers=0, initializer_range=0.12, **_SMALL,
)  # fmt: skip

# The two shapes of the benchmarks.
BENCH = ModelConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
    first_k_dense_replace=1, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=96, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
    topk_group=2, num_nextn_predict_layers=0, initializer_range=0.02, **_SMALL,
)  # fmt: skip

MID = ModelConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=8,
    first_k_dense_replace=1, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=192, kv_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, num_experts_per_tok=6, n_group=8,
    topk_group=4, num_nextn_predict_layers=0, initializer_range=0.02, **_SMALL,
)  # fmt: skip

# Short runs: larger weights and steps than the report's, and a bias that keeps up with scores that change this fast.
_SMALL_TRAIN = TrainConfig(
    steps=300, batch_size=8, batch_size_start=8, warmup_steps=20, learning_rate=4e-3, learning_rate_min=4e-4,
    learning_rate_final=1.2e-4, bias_update_speed=1e-2, ema_decay=0.98, moment_dtype="float32", checkpoint_every=100,
)  # fmt: skip
_SMALL_DATA = DataConfig(seq_len=256, domain_bytes=600_000)

_NEEDLES = Config(
    model=NEEDLES,
    train=replace(
        _SMALL_TRAIN, steps=1600, batch_size=16, batch_size_start=16, warmup_steps=50, learning_rate=5e-3,
        learning_rate_min=1e-3, learning_rate_final=1e-3, ema_decay=0.0,
    ),
    data=DataConfig(seq_len=256, domain_bytes=50_000, retrieval_bytes=4_000_000, fim_rate=0.0, eval_sequences=56),
)  # fmt: skip
_NEEDLES_YARN = RopeScaling(factor=20.0, original_max_position_embeddings=256)

PRESETS: dict[str, Config] = {
    "deepseek_v3_671b": Config(model=DEEPSEEK_V3_671B),
    "deepseek_v3_671b_32k": extended(Config(), 32 * 1024, RopeScaling(), steps=1000),
    "deepseek_v3_671b_128k": extended(Config(), 128 * 1024, RopeScaling(), steps=1000),
    "deepseek_v2": Config(model=DEEPSEEK_V2),
    "deepseek_v2_lite": Config(model=DEEPSEEK_V2_LITE),
    "moonlight_16b_a3b": Config(model=MOONLIGHT_16B_A3B),
    "kimi_k2": Config(model=KIMI_K2),
    "glm_4_7_flash": Config(model=GLM_4_7_FLASH),
    "tiny": Config(model=TINY, train=_SMALL_TRAIN, data=replace(_SMALL_DATA, seq_len=128)),
    "quick": Config(model=QUICK, train=replace(_SMALL_TRAIN, steps=1300), data=_SMALL_DATA),
    "needles": _NEEDLES,
    "needles_1k": extended(_NEEDLES, 1024, _NEEDLES_YARN, steps=150),
    "needles_4k": extended(_NEEDLES, 4096, _NEEDLES_YARN, steps=150),
    "bench": Config(model=BENCH, train=_SMALL_TRAIN, data=_SMALL_DATA),
    "mid": Config(model=MID, train=_SMALL_TRAIN, data=_SMALL_DATA),
}


def preset(name: str) -> Config:
    """Raises ValueError that lists the presets if `name` is none of them."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
