"""Configurations validate themselves, are changed by name, survive JSON, and say how they differ from the recipe."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import Config, DataConfig, ModelConfig, RopeScaling, TrainConfig
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import (
    ALIASES,
    RECIPE,
    SECTIONS,
    field_names,
    from_dict,
    override,
    parse_settings,
    recipe_differences,
    to_dict,
)


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
        (lambda: DataConfig(holdout_fraction=0.0), "holdout_fraction: expected 0 < fraction < 1, got 0.0"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused_with_one_line_that_names_the_field(make, message, request):
    with pytest.raises(ValueError, match=message) as raised:
        unchecked(make)
    assert "\n" not in str(raised.value)


def unchecked(make):
    """Runs `make`; where the test run checks annotations at run time, that check would come first, so it is switched off."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return make()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


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


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("num_experts_per_tok", "4", 4), ("learning_rate", "1e-3", 1e-3), ("q_lora_rank", "null", None),
        ("q_lora_rank", "64", 64), ("tie_word_embeddings", "true", True), ("tie_word_embeddings", "0", False),
        ("rope_scaling", "null", None), ("rope_scaling", '{"factor": 4.0}', RopeScaling(factor=4.0)),
        ("selector", "greedy", "greedy"), ("remat", "full", "full"), ("corpus", "a.txt", "a.txt"), ("aux_loss_alpha", "0", 0.0),
        ("attention_bias", "false", False),
    ],
)  # fmt: skip
def test_text_becomes_a_value_of_the_field_s_type(name, text, value):
    field = ALIASES.get(name, name)
    changed = override(preset("tiny"), {name: text})
    assert getattr(getattr(changed, field_names()[field]), field) == value
    # Nothing else has moved.
    again = override(changed, {field: getattr(getattr(preset("tiny"), field_names()[field]), field)})
    assert again == preset("tiny")


@pytest.mark.parametrize(
    "settings_, message",
    [
        ({"n_routed_expert": "4"}, "unknown setting 'n_routed_expert'; nearest: n_routed_experts"),
        ({"experts_per_token": "4"}, "nearest: .*num_experts_per_tok"),
        ({"hidden_size": "large"}, "hidden_size: expected int, got 'large'"),
        ({"learning_rate": "fast"}, "learning_rate: expected float, got 'fast'"),
        ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings: expected true or false, got 'maybe'"),
        ({"rope_scaling": "{"}, "rope_scaling: expected JSON or null, got '{'"),
        ({"rope_scaling": '{"facto": 4}'}, "RopeScaling: unknown key 'facto'; nearest: factor"),
        ({"rope_scaling": "3"}, "RopeScaling: expected an object, got 3"),
        ({"remat": "most"}, "remat: expected one of none, report, full, got 'most'"),
        ({"topk_group": "5"}, "topk_group: expected at most n_group=4, got 5"),
    ],
)
def test_wrong_settings_are_refused_with_one_line(settings_, message):
    with pytest.raises(ValueError, match=message) as raised:
        unchecked(lambda: override(preset("tiny"), settings_))
    assert "\n" not in str(raised.value)


def test_settings_are_name_equals_value_and_the_value_may_hold_an_equals_sign():
    assert parse_settings(["a=1", "corpus=x=y"]) == {"a": "1", "corpus": "x=y"}
    with pytest.raises(ValueError, match="--set: expected name=value, got 'hidden_size'"):
        parse_settings(["hidden_size"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip_through_json(name):
    assert from_dict(json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]


@settings(max_examples=20)
@given(st.integers(1, 10**6), st.floats(1e-8, 1.0), st.booleans(), st.sampled_from([None, 1, 7]))
def test_any_change_survives_a_round_trip_through_json(vocabulary, rate, tied, rank):
    changes = {"vocab_size": vocabulary, "learning_rate": rate, "tie_word_embeddings": tied, "q_lora_rank": rank}
    config = override(preset("tiny"), changes)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_keys_of_a_stored_config_are_refused(section):
    stored = to_dict(preset("tiny"))
    stored[section]["seq_lenn"] = 3
    with pytest.raises(ValueError, match="unknown key 'seq_lenn'"):
        from_dict(stored)


def test_every_field_name_occurs_in_one_section_only():
    names = [f.name for section in SECTIONS for f in dataclasses.fields(type(getattr(Config(), section)))]
    assert len(names) == len(set(names)) == len(field_names())
    assert not set(ALIASES) & set(names) and set(ALIASES.values()) <= set(names)


def test_every_name_of_the_recipe_is_a_field_and_stands_in_one_topic():
    listed = [name for names in RECIPE.values() for name in names]
    assert len(listed) == len(set(listed)) and set(listed) <= set(field_names())


def test_the_published_run_differs_from_the_recipe_in_nothing_and_a_changed_one_says_where():
    assert recipe_differences(preset("deepseek_v3_671b")) == []
    changed = override(preset("deepseek_v3_671b"), {"controller": "batch", "mtp_loss_weight": "0.5"})
    assert recipe_differences(changed) == [
        "balancing: controller = batch (published: sign)", "MTP: mtp_loss_weight = 0.5 (published: 0.3)",
    ]  # fmt: skip
    # Shape and precision are no part of the recipe.
    assert recipe_differences(override(preset("deepseek_v3_671b"), {"hidden_size": "64"})) == []


def test_an_integer_in_a_float_field_becomes_a_float():
    values = json.loads(json.dumps(to_dict(Config())).replace('"rope_theta": 10000.0', '"rope_theta": 10000'))
    assert values["model"]["rope_theta"].__class__ is int
    restored = from_dict(values).model.rope_theta
    assert restored == 10000.0 and restored.__class__ is float
    assert override(Config(), {"rope_theta": 50000}).model.rope_theta.__class__ is float
