"""Whole plans: of every preset on every chip, labelled, as JSON, and as a table of at most 100 columns."""

import json

import pytest

from dsv3_jax.model.count import count_parameters
from dsv3_jax.parallel.schedules import Costs
from dsv3_jax.planner.chips import CHIPS, chip_named
from dsv3_jax.planner.pipelines import costs_of
from dsv3_jax.planner.plan import make_plan
from dsv3_jax.planner.question import Question
from dsv3_jax.planner.rows import Plan, Row, Section
from dsv3_jax.planner.table import render, scaled
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import override

V3 = preset("deepseek_v3_671b")
SHARDED = {"layout": "fully_sharded", "mesh_expert": 64, "batch_size": 512, "batch_size_start": 512}


def plan_of(chip="v5p", chips=512, config=V3, settings=SHARDED, **asked):
    return make_plan(override(config, settings), chip_named(chip), Question(chips=chips, **asked))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan_within_100_columns(name):
    run = {"batch_size": 16, "batch_size_start": 8, "layout": "report", "mesh_expert": 8, "mesh_pipe": 2}
    plan = plan_of("h800", 16, preset(name), run, schedule="all", mfu=0.4, output_tokens_per_second=100.0)
    assert plan.value("parameters", "main", "total") == count_parameters(preset(name).model).total
    assert max(map(len, render(plan).splitlines())) <= 100


@pytest.mark.parametrize("chip", CHIPS)
def test_every_figure_is_labelled_and_every_key_is_its_row_s_own(chip):
    plan = plan_of(chip, mfu=0.4, compute="fp8")
    for section in plan.sections:
        assert len({row.key for row in section.rows}) == len(section.rows)
        for row in section.rows:
            assert row.origin in ("input", "derived") and row.label
            assert len(row.values) == len(section.columns) and len(row.units) in (1, len(row.values))
    assert all(row.origin == "input" for row in plan.section("inputs").rows)
    assert all(row.origin == "derived" for row in plan.section("memory").rows)


def test_the_keys_that_other_programs_read_are_there():
    keys = {row.key for row in plan_of().section("memory").rows}
    assert keys >= {"weights", "moments", "gradients", "saved_carry", "saved_attention", "expert_buffers", "attention_buffers"}
    assert keys >= {"arguments", "temporaries", "peak", "fits", "latent_cache", "saved.none", "saved.report", "saved.full"}


def test_a_cause_of_no_bytes_has_its_key_but_no_line():
    plan = plan_of()
    assert plan.value("memory", "masters") == 0 and "masters" not in render(plan).split("Assumptions")[0]


def test_a_plan_survives_json_and_says_what_it_assumed():
    plan = plan_of(schedule=None)
    again = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    weights = again["sections"]["memory"]["rows"]["weights"]
    assert (weights["value"], weights["unit"], weights["origin"]) == (plan.value("memory", "weights"), "B", "derived")
    assert again["assumptions"] == list(plan.assumptions) and len(plan.assumptions) > 5


def test_what_does_not_fit_is_a_line_and_not_an_error():
    fits, too_large = plan_of("v5p"), plan_of("v6e")
    (line,) = (line for line in render(too_large).splitlines() if "does not fit" in line)
    assert " 31.2 GiB" in line and "does not fit" not in render(fits) and " fits: " in render(fits)
    assert too_large.value("memory", "fits") > 1 > fits.value("memory", "fits")
    assert too_large.value("memory", "peak") == fits.value("memory", "peak")


def test_state_and_temporaries_are_the_peak():
    plan = plan_of()
    parts = plan.value("memory", "arguments") + plan.value("memory", "temporaries")
    assert parts == pytest.approx(plan.value("memory", "peak"))
    assert plan.value("memory", "saved.report") == sum(
        row.values[0] for row in plan.section("memory").rows if row.key.startswith("saved_")
    )


def test_hours_and_dollars_follow_from_the_rate():
    plan = plan_of(tokens=1e12, dollars_per_hour=3.0, mfu=0.39)
    rate = plan.value("time", "rate_mfu")
    hours = 512 * 1e12 / rate / 3600
    assert plan.value("cost", "hours", "mfu") == plan.value("cost", "hours_per_trillion", "mfu") == pytest.approx(hours)
    assert plan.value("cost", "dollars", "mfu") == pytest.approx(3 * hours)
    assert plan.value("cost", "days", "mfu") == pytest.approx(hours / 512 / 24)


def test_the_published_mfu_on_the_published_chip_costs_the_published_hours():
    run = {"layout": "report", "mesh_pipe": 16, "micro_batch_size": 1024}
    plan = plan_of("h800", 1024, settings=run, mfu=0.3894)
    assert plan.value("cost", "hours_per_trillion", "mfu") == pytest.approx(180e3, rel=0.005)
    assert plan.value("cost", "dollars", "mfu") == pytest.approx(5.328e6, rel=0.005)
    assert plan.value("serving", "decode") == pytest.approx(14.76e-3 * 7168 / 7000, rel=1e-3)


def test_decoding_on_a_torus_pays_for_every_link_that_a_row_crosses():
    exchange = 3 * 32 * 9 * 7168 / 600e9  # bytes of a channel, sequences, experts, channels; all links of a v5p
    assert plan_of("v5p").value("serving", "decode") == pytest.approx(2 * 61 * exchange * 3)  # 64 ranks: three hops


def test_links_of_the_time_are_those_of_the_traffic():
    for chip in ("v5p", "h800"):
        plan = plan_of(chip)
        for link in chip_named(chip).links:
            sent = [row.values[1] for row in plan.section("communication").rows if row.key.endswith(f".{link}")]
            assert plan.value("time", f"link.{link}") == pytest.approx(sum(sent))


def test_the_latent_cache_grows_with_context_and_requests():
    plan = plan_of(context=1000, requests=7)
    assert plan.value("memory", "latent_cache") == plan.value("serving", "cache") == 70_272 * 7000


def test_schedules_are_simulated_at_the_mesh_s_stages_beside_their_formulas():
    run = {"layout": "report", "mesh_pipe": 16, "micro_batch_size": 1024}
    plan = plan_of("h800", 1024, settings=run, schedule="all")
    assert {row.key: row.values for row in plan.section("schedules").rows} == {
        "1f1b": (45, 45, 0, 16, 1, 16), "zb1p": (15, 15, 0, 16, 1, 16),
        "dualpipe": (14, 14, 0, 17, 2, 16), "dualpipev": (14, 14, 0, 17, 2, 8),
    }  # fmt: skip
    costs = costs_of(["F=1.13", "B=2.47", "W=0.48", "FB=3.6"])  # (PP/2 - 1)(F&B + B - 3W), and one F less for the middle ranks
    plan = plan_of(schedule="dualpipe", stages=16, micro_batches=120, costs=costs)
    (row,) = plan.section("schedules").rows
    assert row.values[:3] == (pytest.approx(32.41 - 1.13), pytest.approx(7 * (3.6 + 2.47 - 1.44)), pytest.approx(-1.13))
    assert any("differs, and agrees without hops for F = B - W >= W" in line for line in plan.assumptions)
    plan = plan_of(schedule="1f1b", costs=costs)  # no difference but that of rounding
    assert plan.section("schedules").rows[0].values[2] == 0 and "8 stages, 20 micro" in plan.section("schedules").title


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mfu": 1.5}, "--mfu: expected a share"),
        ({"mfu": -1.0}, "--mfu: expected a positive"),
        ({"tokens": float("inf")}, "--tokens: expected a positive"),
        ({"dollars_per_hour": 0.0}, "--dollars_per_hour"),
        ({"requests": 0}, "--requests"),
        ({"compute": "fp4"}, "--compute: expected bf16 or fp8, got 'fp4'"),
        ({"schedule": "gpipe"}, "--schedule: expected one of all, 1f1b"),
        ({"schedule": "all", "stages": 7}, "--stages: expected an even number, at least 2, got 7"),
        ({"schedule": "dualpipe", "micro_batches": 6}, "dualpipe: expected .* at least 2 x 8 ranks, got 6; split"),
        ({"schedule": "1f1b", "micro_batches": -1}, "--micro_batches: expected at least 1, got -1"),
        ({"schedule": "1f1b", "costs": Costs(W=3)}, "W within B"),
    ],
)
def test_questions_without_sense_are_refused_in_one_line(asked, message):
    with pytest.raises(ValueError, match=message) as error:
        plan_of(**asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2**30, "B", "1.000 GiB"),
        (70_272, "B", "70,272 B"),
        (0, "B", "0 B"),
        (0.0125, "s", "12.500 ms"),
        (250.45e9, "FLOP", "250.450 GFLOP"),
        (14.8e12, "tokens", "14.800 T tok"),
        (0.391, "%", "39.1 %"),
        (671_026_419_200, "parameters", "671,026,419,200"),
        (None, "B", "-"),
        ("report", "", "report"),
    ],
)
def test_figures_are_scaled_for_people(value, unit, text):
    assert " ".join(scaled(value, unit)).strip() == text


def test_numbers_of_a_column_end_in_the_same_place():
    rows = tuple(Row(str(i), "x" * i, (10**i,), ("h",)) for i in range(1, 9))
    lines = render(Plan((Section("s", "Title", rows),), ())).splitlines()[1:9]
    assert len({line.index(" h ") for line in lines}) == 1


def test_a_figure_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError):
        plan_of().value("memory", "weight")


@pytest.mark.parametrize(
    "setting, message", [("G=1", "expected one of F, B, W, FB, hop, got 'G'"), ("F=x", "F: expected a number")]
)
def test_costs_that_are_none_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        costs_of([setting])
