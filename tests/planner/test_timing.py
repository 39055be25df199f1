"""Bounds, rates and hours: what must scale, and figures by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.programs import small

from dsv3_jax.planner import timing
from dsv3_jax.planner.chips import chip_named
from dsv3_jax.planner.share import make_share
from dsv3_jax.planner.wire import traffic
from dsv3_jax.planner.work import executed
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training.schedules import count_steps, total_tokens

V3 = override(preset("deepseek_v3_671b"), {"layout": "fully_sharded", "mesh_expert": 64, "micro_batch_size": 512})
SHARE = make_share(V3, 512)


def bounds(chip, compute="bf16"):
    return timing.bounds(SHARE, chip, traffic(SHARE, chip), compute)


def test_each_bound_follows_its_own_number_of_the_chip_alone():
    base = bounds(chip_named("h800"))
    assert bounds(chip_named("h800", ["bf16_tflops=1978"])) == base._replace(compute=base.compute / 2)
    assert bounds(chip_named("h800", ["hbm_gbs=6704"])) == base._replace(memory=base.memory / 2)
    faster = bounds(chip_named("h800", ["network_gbs=100"]))
    assert faster == base._replace(links={"node": base.links["node"], "network": pytest.approx(base.links["network"] / 2)})


def test_the_compute_bound_is_the_executed_work_over_the_peak():
    tokens = 15360 * 4096 / 512
    assert bounds(chip_named("h800")).compute == pytest.approx(executed(SHARE).total * tokens / 989e12)


def test_fp8_speeds_up_linear_layers_only():
    h800, v5p = chip_named("h800"), chip_named("v5p")
    narrow, wide = bounds(h800, "fp8"), bounds(h800)
    work, tokens = executed(SHARE), 15360 * 4096 / 512
    assert wide.compute - narrow.compute == pytest.approx(
        (work.linear + work.linear_repeated) * tokens * (1 / 989e12 - 1 / 1979e12)
    )
    assert bounds(v5p, "fp8") == bounds(v5p), "which has no FP8 units"


def test_the_slowest_bound_hides_the_rest_or_all_are_added():
    found = timing.Bounds(3.0, 2.0, {"node": 1.0, "network": 4.0})
    assert (found.overlapped, found.sequential) == (4.0, 10.0)


def test_the_optimiser_moves_each_piece_of_its_state_there_and_back():
    def moved(**changes):
        share = make_share(small(**changes), 1)
        return timing.memory_traffic(share)["optimiser"] / sum(w.state for w in share.weights)

    assert moved() == 4 + 2 * (4 + 4 + 4)  # gradient read; both moments and the weight read and written
    assert moved(moment_dtype="bfloat16") == 4 + 2 * (2 + 2 + 4)
    assert moved(param_dtype="bfloat16") == 2 + 2 * (4 + 4 + 4) + 2  # narrow gradient; master both ways; new weight written


def test_activations_move_with_the_inputs_and_outputs_of_products():
    share = make_share(small(remat="none", num_nextn_predict_layers=0, num_hidden_layers=1, first_k_dense_replace=1), 1)
    m = share.config.model
    qk, v, heads, d = 24, 16, 4, m.hidden_size
    sides = [(d, 32), (32, heads * qk), (d, 16 + 8), (16, heads * (16 + v)), (heads * v, d), (d, 128), (d, 128), (128, d)]
    sides.append((d, m.vocab_size))
    expected = 3 * 4 * share.tokens * sum(a + b for a, b in sides)
    assert timing.memory_traffic(share)["activations"] == expected


def test_scores_move_with_the_square_of_the_window():
    one, two = (timing.memory_traffic(make_share(small(seq_len=n), 1))["scores"] for n in (1024, 2048))
    assert two == 4 * one


@pytest.mark.parametrize("changes", [{}, {"batch_size_start": 15360}, {"train_tokens": 1e12, "batch_size_start": 64}])
def test_steps_are_those_of_the_schedule(changes):
    config = override(preset("deepseek_v3_671b"), changes)
    tokens = total_tokens(config)
    assert timing.steps(config, tokens) == pytest.approx(count_steps(config.train, 4096, tokens), rel=1e-3)  # it rounds batches


@given(st.floats(1e9, 1e13), st.integers(1, 10_000), st.floats(0.01, 1))
def test_rate_and_hours_undo_each_other(flops, devices, mfu):
    rate = timing.tokens_per_second(flops, devices, 989, mfu)
    assert rate * flops / devices / 989e12 == pytest.approx(mfu)
    assert timing.hours_per_trillion(rate, devices) * 3600 * rate / devices == pytest.approx(1e12)
