"""Configurations are changed by name, survive JSON, and say how they differ from the recipe."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import Config, RopeScaling
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
from oracles.unchecked import unchecked


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
