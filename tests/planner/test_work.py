"""Executed FLOPs against the real gradient's program, useful ones against the published convention."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.programs import gradient_flops, small

from dsv3_jax.config import Config
from dsv3_jax.model.flops import training_flops_per_token
from dsv3_jax.planner.share import make_share
from dsv3_jax.planner.work import causal_pairs, executed, full_window_flops, padding
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import override


@pytest.mark.parametrize("remat", ["none", "report", "full"])
@pytest.mark.parametrize("settings", [{}, {"q_lora_rank": None}, {"attention": "gqa", "num_key_value_heads": 2}], ids=str)
def test_executed_flops_are_those_of_the_program(remat, settings):
    config = small(remat=remat, **settings)
    tokens = config.train.batch_size * config.data.seq_len
    assert executed(make_share(config, 1)).total == gradient_flops(config) / tokens


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_not_repeated_is_the_published_convention(name):
    config = override(preset(name), {"batch_size": 8, "batch_size_start": 8})
    work = executed(make_share(config, 1))
    useful = training_flops_per_token(config.model, config.data.seq_len)
    assert work.linear + work.attention + work.other == pytest.approx(useful, rel=1e-12)
    assert work.total > useful


def test_a_full_window_costs_as_published():
    assert full_window_flops(preset("deepseek_v3_671b").model, 4096) / 1e9 == pytest.approx(281.15, abs=0.005)
    assert full_window_flops(preset("deepseek_v2").model, 4096) / 1e9 == pytest.approx(125.10 + 2 * 30.20, abs=0.02)


@given(st.integers(1, 3000))
def test_blocks_read_every_pair_below_the_diagonal_and_not_many_above(length):
    pairs = causal_pairs(length)
    assert length * (length + 1) / 2 <= pairs <= length**2
    assert pairs <= length * (length + 1) / 2 + length * max(64, -(-length // 8)) / 2


def test_policies_repeat_more_the_less_they_keep():
    none, report, full = (executed(make_share(small(remat=r), 1)).total for r in ("none", "report", "full"))
    assert none < report < full


def test_the_exchange_repeats_the_experts_inputs_whatever_the_policy():
    share = make_share(small(remat="none", layout="report", mesh_expert=2), 2)
    model = share.config.model
    layers = model.n_main_moe_layers + model.num_nextn_predict_layers
    again = 2 * layers * model.num_experts_per_tok * 2 * model.hidden_size * model.moe_intermediate_size
    assert executed(share).linear_repeated == again


def test_tensor_ranks_repeat_what_is_not_divided_among_them():
    base = override(small(remat="none"), {"layout": "report", "mesh_expert": 1})
    one = executed(make_share(base, 1))
    two = executed(make_share(override(base, {"mesh_tensor": 2}), 2))
    m = base.model
    layers = m.num_hidden_layers + m.num_nextn_predict_layers
    latents = layers * m.hidden_size * (m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim)
    assert two.linear_repeated - one.linear_repeated == 6 * latents
    others = (layers - m.n_dense_layers) * m.hidden_size * m.n_routed_experts + 2 * m.hidden_size**2
    assert two.other_repeated - one.other_repeated == 6 * others
    assert (two.linear, two.attention_repeated) == (one.linear, one.attention_repeated)


def test_a_tied_head_works_as_an_untied_one():
    tied = Config(model=replace(small().model, tie_word_embeddings=True), train=small().train, data=small().data)
    assert executed(make_share(tied, 1)) == executed(make_share(small(), 1))


def test_whole_buffers_multiply_the_experts_work_and_nothing_else():
    assert padding(make_share(small(), 1)) == 0
    share = make_share(small(remat="none", layout="report", mesh_expert=2, exchange_buffer=1.5), 2)
    model = share.config.model
    layers = model.n_main_moe_layers + model.num_nextn_predict_layers
    matrix = 2 * model.hidden_size * model.moe_intermediate_size
    experts = layers * model.num_experts_per_tok * matrix * (3 * 3 + 2)
    assert padding(share) == 0.5 * experts
    assert padding(share, every_expert=True) == (1.5 * model.n_routed_experts / 2 - 1) * experts
