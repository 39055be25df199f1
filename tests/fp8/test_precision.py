"""The table of precisions: what the report runs in FP8 and how, and that every switch of the recipe reaches it."""

from dataclasses import replace

import pytest

from dsv3_jax.config import Fp8Recipe
from dsv3_jax.fp8.accumulate import Accumulation
from dsv3_jax.fp8.formats import E4M3, E5M2, E5M6
from dsv3_jax.fp8.precision import LINEAR, SERVING, attention_cache, products, swiglu_cache, table, wire
from dsv3_jax.fp8.quantize import WHOLE, Quantiser
from dsv3_jax.presets import preset

TINY = preset("tiny")
QUANTISERS = ("x", "weight", "gradient", "x_wgrad", "gradient_wgrad")
SENT_OR_AFTER_ATTENTION = {"o_proj", "experts.gate_proj", "experts.up_proj"}


def configured(**recipe):
    return replace(TINY.model, fp8=Fp8Recipe(**recipe))


@pytest.mark.parametrize("operation", LINEAR)
def test_by_default_every_linear_layer_has_the_report_s_tiles_and_powers_of_two(operation):
    how = products(configured(), operation)
    x = Quantiser(E4M3, (1, 128), operation in SENT_OR_AFTER_ATTENTION, 1e-30)
    gradient = Quantiser(E4M3, (1, 128), operation == "experts.down_proj", 1e-30)
    assert how.weight == Quantiser(E4M3, (128, 128), False, 1e-30)
    assert (how.x, how.x_wgrad) == (x, replace(x, tile=(128, 1)))
    assert (how.gradient, how.gradient_wgrad) == (gradient, replace(gradient, tile=(128, 1)))
    assert how.accumulation == Accumulation("float32", "aligned", 128)


@pytest.mark.parametrize("operation", ["embed_tokens", "lm_head", "eh_proj", "gate"])
def test_embedding_head_and_router_stay_in_higher_precision(operation):
    assert products(configured(), operation) is None
    assert (products(configured(router=True), operation) is not None) == (operation == "gate")


def test_without_a_recipe_nothing_is_quantised():
    assert all(products(TINY.model, operation) is None for operation in LINEAR)
    assert attention_cache(TINY.model) is swiglu_cache(TINY.model) is None and wire(TINY.model) == (None, None)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ({"activation_format": "e5m2"}, {"x": {"form": E5M2}, "x_wgrad": {"form": E5M2}}),
        ({"weight_format": "e5m2"}, {"weight": {"form": E5M2}}),
        ({"gradient_format": "e5m2"}, {"gradient": {"form": E5M2}, "gradient_wgrad": {"form": E5M2}}),
        ({"gradient_scaling": "block"}, {"gradient": {"tile": (128, 128)}, "gradient_wgrad": {"tile": (128, 128)}}),
        ({"power_of_two": "everywhere"}, dict.fromkeys(QUANTISERS, {"power_of_two": True})),
        ({"scaling": "tensor"}, dict.fromkeys(QUANTISERS, {"tile": (WHOLE, WHOLE)})),
        ({"accumulation": "promoted", "promotion_interval": 64}, {"accumulation": {"fidelity": "promoted", "interval": 64}}),
        ({"accumulator": "apart"}, {"accumulation": {"reading": "apart"}}),
        ({"tile": 32}, {"x": {"tile": (1, 32)}, "x_wgrad": {"tile": (32, 1)}, "weight": {"tile": (32, 32)},
                        "gradient": {"tile": (1, 32)}, "gradient_wgrad": {"tile": (32, 1)}}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_each_switch_changes_what_it_names_and_nothing_else(recipe, changes):
    plain, changed = products(configured(), "q_a_proj"), products(configured(**recipe), "q_a_proj")
    assert changed == replace(plain, **{name: replace(getattr(plain, name), **change) for name, change in changes.items()})


def test_power_of_two_nowhere_reaches_what_the_report_raises():
    for operation in SENT_OR_AFTER_ATTENTION:
        assert not products(configured(power_of_two="nowhere"), operation).x.power_of_two
    assert not products(configured(power_of_two="nowhere"), "experts.down_proj").gradient.power_of_two


def test_caches_and_wire_are_the_report_s_or_the_compute_dtype():
    assert attention_cache(configured()) == Quantiser(E5M6, (1, 128), True, 1e-30)
    assert swiglu_cache(configured()) == Quantiser(E4M3, (1, 128), False, 1e-30)
    both = Quantiser(E4M3, (1, 128), True, 1e-30)
    assert wire(configured()) == (both, both)
    wide = configured(attention_cache="compute", swiglu_cache="compute", dispatch="compute")
    assert attention_cache(wide) is swiglu_cache(wide) is None and wire(wide) == (None, None)
    assert attention_cache(configured(attention_cache="e4m3")).form == E4M3


def test_caches_have_the_recipe_s_tile_and_powers_of_two_and_one_scale_a_token_and_tile_whatever_the_products_have():
    """A scale of the whole tensor would be of one device's part, and other on every mesh."""
    for scaling in ("fine", "tensor", "delayed"):
        config = configured(tile=32, scaling=scaling)
        assert attention_cache(config) == Quantiser(E5M6, (1, 32), True, 1e-30)
        assert swiglu_cache(config) == Quantiser(E4M3, (1, 32), False, 1e-30)
    for power_of_two, raised in (("everywhere", True), ("nowhere", False)):
        config = configured(power_of_two=power_of_two)
        assert attention_cache(config).power_of_two == swiglu_cache(config).power_of_two == raised


@pytest.mark.parametrize("recipe", [{"power_of_two": "nowhere"}, {"scaling": "tensor"}], ids=str)
def test_what_could_not_be_rounded_once_more_without_error_is_not_sent_in_fp8(recipe):
    assert wire(configured(**recipe)) == (None, None)


def test_a_gradient_in_blocks_travels_as_it_is_and_the_tokens_in_fp8():
    x, gradient = wire(configured(gradient_scaling="block"))
    assert x is not None and gradient is None


def test_the_table_has_a_row_for_every_operation_and_says_what_products_says():
    config = replace(TINY, model=configured())
    rows = {row.operation: row for row in table(config)}
    assert {"embed_tokens", "norms", "attention core", "gate", "dispatch", "combine", "lm_head, loss", "AdamW"} <= set(rows)
    for name in ("q_a_proj", "o_proj", "experts.up_proj", "experts.down_proj"):
        how = products(config.model, name)
        assert (rows[name].fprop, rows[name].dgrad) == tuple(
            text.replace("e4m3 ", "") for text in (f"{how.x} . {how.weight}", str(how.gradient))
        )
    assert rows["gate"].fprop == "float32" and rows["o_proj"].kept == "e5m6 1x128 2^n"
    plain = {row.operation: row for row in table(TINY)}
    assert set(plain) == set(rows) and plain["q_a_proj"].fprop == TINY.model.compute_dtype


@pytest.mark.parametrize("operation", LINEAR)
def test_serving_rounds_as_released_code_does(operation):
    """Amax of at least 1e-4, no powers of two, nothing kept."""
    model = replace(TINY.model, fp8=SERVING)
    how = products(model, operation)
    assert how.x == Quantiser(E4M3, (1, 128), False, 1e-4) and how.weight == Quantiser(E4M3, (128, 128), False, 1e-4)
    assert attention_cache(model) is swiglu_cache(model) is None
