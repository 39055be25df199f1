"""Counts against the published cost of DeepSeek-V3 and V2, and against a count by hand of a small model."""

import dataclasses

import pytest

from dsv3_jax.model.flops import matmul_parameters, training_flops_per_token
from dsv3_jax.presets import preset


def test_v3_has_the_published_matmul_parameters_to_the_unit():
    assert matmul_parameters(preset("deepseek_v3_671b").model) == 36_624_596_992


@pytest.mark.parametrize(
    ("name", "mtp", "gflop"),
    [("deepseek_v3_671b", False, 250.45), ("deepseek_v3_671b", True, 260.64), ("deepseek_v2", False, 155.30)],
)
def test_training_costs_the_published_gflop_per_token(name, mtp, gflop):
    # Published to the hundredth of a GFLOP.
    assert training_flops_per_token(preset(name).model, 4096, mtp=mtp) / 1e9 == pytest.approx(gflop, abs=0.005)


def test_a_token_pays_for_its_chosen_experts_only():
    model = preset("bench").model
    twice = dataclasses.replace(model, n_routed_experts=2 * model.n_routed_experts)
    router = model.n_main_moe_layers * model.hidden_size * model.n_routed_experts
    assert matmul_parameters(twice) - matmul_parameters(model) == router


def test_the_small_benchmark_shape_equals_a_count_by_hand():
    d, heads, width, layers = 256, 8, 128, 4
    attention = d * 96 + 96 * heads * 48 + d * (64 + 16) + 64 * heads * (32 + 32) + heads * 32 * d
    dense, moe = 3 * d * 512, d * 16 + (4 + 1) * 3 * d * width
    matrices = layers * attention + dense + 3 * moe + 4096 * d
    model = preset("bench").model
    assert matmul_parameters(model) == matrices
    assert training_flops_per_token(model, 256) == 6 * matrices + 3 * layers * 2 * heads * (48 + 32) * 128
