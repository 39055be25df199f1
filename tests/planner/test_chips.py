"""The table of chips: every number has a source, every mistake one line."""

import pytest

from dsv3_jax.planner.chips import CHIPS, NUMBERS, chip_named


@pytest.mark.parametrize("name", CHIPS)
def test_every_number_of_a_chip_names_its_source(name):
    chip = chip_named(name)
    assert chip.name == name and set(chip.sources) == set(NUMBERS)
    assert all(chip.sources[number] for number in NUMBERS)
    assert chip.links == (("ici",) if chip.torus_dims else ("node", "network"))


def test_half_a_chip_is_half_a_chip():
    half = chip_named("tpu7x")
    assert (2 * half.bf16_tflops, 2 * half.fp8_tflops, 2 * half.hbm_gbs, 2 * half.node_gbs) == (2307, 4614, 7380, 600)


def test_a_number_can_be_replaced_and_says_so():
    chip = chip_named("h800", ["bf16_tflops=500", "torus_dims=2"])
    assert (chip.bf16_tflops, chip.torus_dims, chip.hbm_gbs) == (500, 2, chip_named("h800").hbm_gbs)
    assert chip.sources["bf16_tflops"] == "the command line" != chip_named("h800").sources["bf16_tflops"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("h9000", [], "expected one of h800, h100, h200, v5p, v6e, tpu7x, got 'h9000'"),
        ("h800", ["tflops=1"], "expected one of bf16_tflops, .*, got 'tflops'"),
        ("h800", ["hbm_gbs=fast"], "hbm_gbs: expected a number, got 'fast'"),
        ("h800", ["hbm_gbs=0"], "hbm_gbs: expected a positive number"),
        ("h800", ["hbm_gbs=nan"], "hbm_gbs: expected a positive number"),
        ("h800", ["hbm_gbs"], "expected name=value"),
    ],
)
def test_mistakes_are_one_line(name, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        chip_named(name, settings)
    assert "\n" not in str(error.value)
