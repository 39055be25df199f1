"""Parameter counts to the unit, for the released models and three small configurations."""

from dataclasses import replace

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.count import count_parameters
from dsv3_jax.presets import preset

# name -> (total, active with head): worked out tensor by tensor, in agreement with the published checkpoints.
RELEASED = {
    "deepseek_v3_671b": (671_026_419_200, 36_625_618_432),
    "deepseek_v2": (235_741_434_880, 20_851_512_320),
    "deepseek_v2_lite": (15_706_484_224, 2_451_435_008),
    "moonlight_16b_a3b": (15_960_110_208, 2_579_231_872),
    "kimi_k2": (1_026_408_232_448, 31_687_095_808),
    "glm_4_7_flash": (29_943_393_920, 3_579_571_840),
}

T0 = ModelConfig(
    vocab_size=512, hidden_size=64, num_hidden_layers=4, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=32,
    kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, intermediate_size=128, moe_intermediate_size=32,
    n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1,
)  # fmt: skip
T1 = ModelConfig(
    vocab_size=32768, hidden_size=512, num_hidden_layers=12, first_k_dense_replace=1, num_attention_heads=8, q_lora_rank=256,
    kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=1536,
    moe_intermediate_size=256, n_routed_experts=32, num_experts_per_tok=4, n_group=1, topk_group=1,
)  # fmt: skip
MAXTEXT_TINY = ModelConfig(
    vocab_size=129280, hidden_size=64, num_hidden_layers=61, first_k_dense_replace=3, num_attention_heads=4, q_lora_rank=32,
    kv_lora_rank=16, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=64, moe_intermediate_size=64,
    n_routed_experts=16, num_experts_per_tok=8, n_group=1, topk_group=1, num_nextn_predict_layers=0,
)  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_exact_number_of_parameters(name):
    count = count_parameters(preset(name).model)
    assert (count.total, count.active_with_head) == RELEASED[name]


def test_deepseek_v3_is_counted_to_the_unit_in_every_convention():
    count = count_parameters(preset("deepseek_v3_671b").model)
    assert count.active == 35_698_939_392
    assert count.active_with_head_and_embedding == 37_552_297_472
    assert (count.mtp, count.mtp_active) == (11_610_068_224, 688_100_608)
    vocabulary = 129280 * 7168
    assert count.mtp + 2 * vocabulary == 13_463_426_304  # as stored, with the copies of embedding and head
    assert count.total + count.mtp + 2 * vocabulary == 684_489_845_504


@pytest.mark.parametrize(
    "config, total, active_with_head, active_with_both, mtp",
    [
        (T0, 309_528, 166_168, 198_936, 77_176),
        (T1, 188_482_912, 50_595_168, 67_372_384, 14_322_592),
        (MAXTEXT_TINY, 33_706_448, 19_730_896, 28_004_816, 0),
    ],
    ids=["T0", "T1", "MaxText"],
)
def test_small_configurations_are_counted_to_the_unit(config, total, active_with_head, active_with_both, mtp):
    count = count_parameters(config)
    assert (count.total, count.active_with_head, count.active_with_head_and_embedding) == (
        total, active_with_head, active_with_both,
    )  # fmt: skip
    assert count.mtp == mtp


def test_tied_embedding_is_stored_once_and_read_as_head():
    tied, untied = count_parameters(replace(T0, tie_word_embeddings=True)), count_parameters(T0)
    assert untied.total - tied.total == 512 * 64
    assert (tied.active, tied.active_with_head) == (untied.active, untied.active_with_head)


def test_bias_is_counted_only_where_a_checkpoint_stores_one():
    with_bias, without = count_parameters(T0), count_parameters(replace(T0, topk_method="greedy"))
    assert with_bias.total - without.total == 3 * 8 and with_bias.mtp - without.mtp == 8
