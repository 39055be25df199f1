"""The published figures, derived: each from the config and what was measured, none written down in the package."""

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import dsv3_jax
from dsv3_jax.parallel.schedules import SCHEDULES
from dsv3_jax.parallel.simulate import simulate
from dsv3_jax.planner.receipts import Phases, bubble, chunk_times, micro_batches, receipts, step_from_chunks
from dsv3_jax.presets import preset
from experiments.plan import PUBLISHED, PUBLISHED_RUN

RUN = PUBLISHED_RUN
FOUND = {receipt.key: receipt.value for receipt in receipts(RUN)}
# Measured with the other routing, multi-rail instead of multi-plane: the source's second column.
OTHER_COLUMN = Phases(forward=1.13, bubble=2.03, backward=1.99, weight=0.48, overlapped=14.00, optimiser=0.31)


@pytest.mark.parametrize(
    ("key", "published", "tolerance"),
    [
        # Tolerances: half a unit of the last published digit, unless a comment says otherwise.
        ("total", 671.03e9, 0.005e9),
        ("active", 36.6e9, 0.05e9),
        ("stored_elements", 684_531_386_000, 0),
        ("stored_bytes", 688_574_839_360, 0),
        ("tensors", 91_991, 0),
        ("int4", 377e9, 0.5e9),
        ("cache", 70_272, 0),
        ("over_mha", 56.9, 0.05),
        ("over_gqa", 3.6, 0.05),
        ("quoted", 32, 0),
        ("flops", 250.45e9, 0.005e9),
        ("flops_full", 281.15e9, 0.005e9),
        ("flops_mtp", 260.64e9, 0.005e9),
        ("tokens_per_day", 272.80e9, 0.005e9),
        ("hours_per_trillion", 180e3, 0.5e3),
        ("step_back", 19.926, 0.001 * 19.926),  # 180K has three digits
        ("mfu", 0.39, 0.005),
        ("mfu_full", 0.4373, 0.003 * 0.4373),  # the source rounds its TFLOPS first
        ("hours", 2664e3, 0),
        ("hours_measured", 2664e3, 0.001 * 2664e3),  # as the hours for 10^12 tokens
        ("dollars", 5.328e6, 0),
        ("dollars_all", 5.576e6, 0),
        ("fewer", 0.875, 0),
        ("pipelines", 120, 0),
        ("phases", 19.926, 0.03),  # six figures rounded to the hundredth
        ("step", 19.926, 0.15 * 19.926),  # the issue's: a bubble formula of equal stages stands for the measured one
        ("step_pairs", 19.926, 0.15 * 19.926),
        ("decode", 14.76e-3, 0.005e-3),
        ("decode_rate", 67, 1),  # the source cuts the digits off
    ],
)
def test_a_published_figure_follows(key, published, tolerance):
    assert abs(FOUND[key] - published) <= tolerance
    assert PUBLISHED[key] == pytest.approx(published, rel=2e-3), "the program's table says the same"


def test_a_further_decimal_of_the_step_is_not_claimed():
    """What the formula does not explain: the bubble was measured at 1.8 times what equal stages without waiting would idle."""
    assert 1.7 < RUN.phases.bubble / FOUND["bubble"] < 1.9


def test_serving_prices_follow_from_production_rates():
    assert FOUND["output_price"] == pytest.approx(2.0 * 8 / 14.8e3 / 3600 * 1e6)
    assert FOUND["input_price"] == pytest.approx(2.0 * 8 / 73.7e3 / 3600 * 1e6)


def test_chunks_add_up_to_the_phases_that_they_were_taken_from():
    chunks, actions = chunk_times(RUN.phases, 16, 120), SCHEDULES["dualpipe"].build(16, 120).actions[0]
    runs = Counter("".join(chunk.kind for chunk in action) for action in actions)
    assert (runs["F"], runs["B"], runs["I"], runs["W"], runs["FB"]) == (23, 8, 15, 15, 97)  # by hand, from the eight steps
    assert runs["F"] * chunks.forward == pytest.approx(1.13)
    assert runs["B"] * chunks.backward + runs["I"] * (chunks.backward - chunks.weight) == pytest.approx(1.99)
    assert runs["W"] * chunks.weight == pytest.approx(0.48) and runs["FB"] * chunks.overlapped == pytest.approx(13.95)


@pytest.mark.parametrize(("n", "possible"), [(60, False), (120, True), (240, False)])
def test_only_micro_batches_of_one_sequence_make_sense_of_the_measured_phases(n, possible):
    chunks = chunk_times(RUN.phases, 16, n)
    longest, both = max(chunks.forward, chunks.backward), chunks.forward + chunks.backward
    assert (longest <= chunks.overlapped <= both) is possible
    assert micro_batches(RUN) == 120


@pytest.mark.parametrize("saving", [False, True])
def test_the_simulated_pipeline_takes_the_derived_time(saving):
    chunks = chunk_times(RUN.phases, 16, 120)
    timeline = simulate(SCHEDULES["dualpipe"].build(16, 120), chunks.costs(saving=saving))
    derived = step_from_chunks(RUN.phases, 16, 120, saving=saving)
    # The published formula is an approximation: of the whole step, its bubble is off by less than a hundredth, and where pairs
    # are overlapped the ranks in the middle run more of them than the first, whose time we count.
    assert timeline.makespan + RUN.phases.optimiser == pytest.approx(derived, rel=0.01)
    assert max(timeline.idle) == pytest.approx(bubble(chunks, 16, saving=saving), rel=0.06)


def test_the_other_measured_column_gives_its_own_step():
    assert sum(OTHER_COLUMN) == pytest.approx(19.946, abs=0.03)
    assert step_from_chunks(OTHER_COLUMN, 16, 120, saving=False) == pytest.approx(19.946, rel=0.15)
    assert step_from_chunks(OTHER_COLUMN, 16, 120, saving=True) > step_from_chunks(RUN.phases, 16, 120, saving=True)


def test_another_model_and_another_run_give_their_own_figures():
    other = {r.key: r.value for r in receipts(RUN._replace(config=preset("deepseek_v2"), gqa_heads=4))}
    assert other["total"] == 235_741_434_880 and other["active"] == 20_851_512_320
    assert other["flops"] / 1e9 == pytest.approx(155.30, abs=0.005)  # published as 155
    assert other["cache"] == 69_120 and other["over_gqa"] == pytest.approx(FOUND["over_gqa"] / 2)
    assert micro_batches(RUN._replace(devices=1024)) == 240 and micro_batches(RUN._replace(pipe=8)) == 60
    twice = {r.key: r.value for r in receipts(RUN._replace(step_seconds=2 * RUN.step_seconds))}
    for key, factor in (("tokens_per_day", 0.5), ("hours_per_trillion", 2), ("mfu", 0.5), ("hours_measured", 2), ("hours", 1)):
        assert twice[key] == pytest.approx(factor * FOUND[key])


def test_half_the_layers_halve_the_decode_bound():
    half = replace(RUN.config, model=replace(RUN.config.model, num_hidden_layers=30, first_k_dense_replace=3))
    shorter = {r.key: r.value for r in receipts(RUN._replace(config=half))}
    assert shorter["decode"] == pytest.approx(FOUND["decode"] * 30 / 61)


def test_no_published_answer_is_written_down_in_the_package():
    # 32, 120 and the like are everywhere; the rest would have to be copied.
    answers = {value for value in PUBLISHED.values() if len(f"{value:g}".rstrip("0").replace(".", "")) > 2} - {0.875}
    answers |= {value / scale for value in answers for scale in (1e3, 1e6, 1e9)}
    for path in Path(dsv3_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and type(node.value) in (int, float):
                assert node.value not in answers, f"{path.name}:{node.lineno}: {node.value}"
