"""Configurations validate themselves."""

import pytest

from dsv3_jax.config import DataConfig, ModelConfig, RopeScaling, TrainConfig
from oracles.unchecked import unchecked


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ModelConfig(hidden_size=0), "hidden_size: expected a positive number, got 0"),
        (lambda: ModelConfig(hidden_act="gelu"), "hidden_act: expected one of silu, got 'gelu'"),
        (lambda: ModelConfig(attention="flash"), "attention: expected one of mla, mha, gqa, mqa, got 'flash'"),
        (lambda: ModelConfig(qk_rope_head_dim=7), "qk_rope_head_dim: expected an even number, got 7"),
        (lambda: ModelConfig(q_lora_rank=0), "q_lora_rank: expected null or > 0, got 0"),
        (lambda: ModelConfig(moe_layer_freq=2), "moe_layer_freq: only 1 exists in this family, got 2"),
        (lambda: ModelConfig(first_k_dense_replace=62), r"first_k_dense_replace: expected 0..num_hidden_layers=61, got 62"),
        (lambda: ModelConfig(num_nextn_predict_layers=-1), "num_nextn_predict_layers: expected 0 or more, got -1"),
        (lambda: ModelConfig(attention="gqa", num_key_value_heads=3), "gqa expects a divisor of .*=128, got 3"),
        (lambda: ModelConfig(n_group=7), "n_group: expected a divisor of n_routed_experts=256, got 7"),
        (lambda: ModelConfig(topk_group=9), "topk_group: expected at most n_group=8, got 9"),
        (lambda: ModelConfig(group_score_topk=33), r"group_score_topk: expected 1..32 \(experts in a group\), got 33"),
        (lambda: ModelConfig(num_experts_per_tok=129), "num_experts_per_tok: expected at most 128, .*, got 129"),
        (lambda: ModelConfig(n_shared_experts=-1), "n_shared_experts: expected 0 or more, got -1"),
        (lambda: ModelConfig(scoring_func="relu"), "scoring_func: expected one of sigmoid, softmax or package.module:function"),
        (lambda: ModelConfig(topk_method="best"), "topk_method: expected one of noaux_tc, .* or package.module:function"),
        (lambda: ModelConfig(compute_dtype="float16"), "compute_dtype: expected one of float32, bfloat16, got 'float16'"),
        (lambda: RopeScaling(factor=0.5), "rope_scaling.factor: expected at least 1, got 0.5"),
        (lambda: TrainConfig(controller="sing"), "controller: expected one of sign, .* or package.module:function, got 'sing'"),
        (lambda: TrainConfig(controller=":f"), "controller: expected one of"),
        (lambda: TrainConfig(steps=0), "steps, train_tokens: expected one of them > 0, got 0"),
        (lambda: TrainConfig(steps=None, train_tokens=None), "steps, train_tokens: expected one of them > 0, got None"),
        (lambda: TrainConfig(batch_size_start=20000), "batch_size_start: expected at most batch_size=15360, got 20000"),
        (lambda: TrainConfig(micro_batch_size=7), "micro_batch_size: expected null or a divisor of batch_size=15360, got 7"),
        (lambda: TrainConfig(adam_b2=1.0), "adam_b2: expected 0 <= adam_b2 < 1, got 1.0"),
        (lambda: TrainConfig(bias_update_speed=-1e-3), "bias_update_speed: expected 0 or more, got -0.001"),
        (lambda: TrainConfig(aux_loss_alpha=-1.0), "aux_loss_alpha: expected null or 0 or more, got -1.0"),
        (lambda: TrainConfig(lr_decay_start_tokens=15e12), "lr_decay_start_tokens <= lr_decay_end_tokens <= .* expected, got"),
        (lambda: DataConfig(seq_len=1), "seq_len: expected at least 2, got 1"),
        (lambda: DataConfig(fim_rate=1.5), r"fim_rate: expected 0..1, got 1.5"),
        (lambda: DataConfig(retrieval_bytes=-1), "retrieval_bytes: expected 0 or more, got -1"),
        (lambda: DataConfig(retrieval_context=0), "retrieval_context: expected null or > 0, got 0"),
        (lambda: DataConfig(holdout_fraction=0.0), "holdout_fraction: expected 0 < fraction < 1, got 0.0"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused_with_one_line_that_names_the_field(make, message, request):
    with pytest.raises(ValueError, match=message) as raised:
        unchecked(make)
    assert "\n" not in str(raised.value)


def test_a_model_without_experts_needs_no_valid_router():
    dense = ModelConfig(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0, n_group=7)
    assert dense.n_moe_layers == 0


def test_layers_with_a_router_are_the_main_ones_and_mtp():
    model = ModelConfig()
    assert (model.n_dense_layers, model.n_main_moe_layers, model.n_moe_layers) == (3, 58, 59)
    assert [ModelConfig(attention=a, num_key_value_heads=8).n_key_value_heads for a in ("mla", "mha", "gqa", "mqa")] == [
        128, 128, 8, 1,
    ]  # fmt: skip
    assert TrainConfig(batch_size=12, batch_size_start=12, micro_batch_size=4).n_micro_batches == 3
    assert TrainConfig().n_micro_batches == 1
