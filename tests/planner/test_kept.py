"""What a layer keeps for the backward pass, counted on its traced program, against counting by hand."""

from dataclasses import replace

import pytest

from dsv3_jax.planner.kept import kept_per_token
from dsv3_jax.presets import preset
from dsv3_jax.settings import override

V3 = preset("deepseek_v3_671b").model
FP8 = override(preset("deepseek_v3_671b"), {"fp8": "report"}).model
LATENTS, HEADS, CHANNELS = 1536 + 512 + 64, 128, 128 * 128


@pytest.mark.parametrize(("dense", "width"), [(True, 18432), (False, 9 * 2048)])
def test_v3_s_layer_keeps_swiglu_s_inputs_in_8_bits_and_the_attention_s_output_in_12(dense, width):
    kept = kept_per_token(FP8, dense=dense)
    assert kept["uint8"] == 2 * width + 1.5 * CHANNELS + CHANNELS / 128  # values, and UE8M0's scales after attention
    logits = 0 if dense else 256
    assert kept["float32"] == 4 * (2 * width / 128 + HEADS + logits)  # scales, log-sum-exp
    assert kept["bfloat16"] == 2 * (LATENTS + 7168)  # latents and the residual stream


def test_v3_s_layer_keeps_less_than_two_thirds_of_bf16():
    models = FP8, replace(V3, experts_implementation="bucketed")
    ours, theirs = (sum(kept_per_token(model, dense=False).values()) for model in models)
    assert 0.6 < ours / theirs < 0.67


def test_with_caches_in_the_compute_dtype_nothing_is_kept_in_bytes():
    model = override(preset("deepseek_v3_671b"), {"fp8": '{"attention_cache": "compute", "swiglu_cache": "compute"}'}).model
    assert "uint8" not in kept_per_token(model, dense=True)


def test_fully_rematerialised_a_layer_keeps_the_router_s_logits_alone():
    kept = kept_per_token(replace(FP8, remat="full"), dense=False)
    assert sum(kept.values()) == 4 * 256
