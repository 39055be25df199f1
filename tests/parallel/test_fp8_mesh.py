"""FP8 on a mesh: the same choices, counts and biases as on one device, and gradients as near as rounding to FP8 lets them be.

Rounding is not continuous. Sums in another order differ by 1e-7, and where one meets the middle between two values of E4M3 an
operand differs by a sixteenth: with a few such elements among thousands, a gradient differs by 1e-4 to 4e-3 of its norm. That
holds with scales that are powers of two and tiles that no rank cuts: then a scale moves no rounding, whichever rows share it,
and Wgrad may take its tiles along each rank's own tokens. With the report's scales Wgrad rounds otherwise on every mesh, as on
hardware: each of its operands once more by up to 2^-4.
"""

from functools import cache

import jax
import numpy as np
import pytest

from oracles.mesh_cells import LAYOUTS as CELLS
from oracles.mesh_cells import Cell, cell_config, first_state, skewed

EXACT = '{"tile": 8, "power_of_two": "everywhere"}'
SEED = 3
FEW_FLIPS, WGRAD = 1e-2, 2**-4  # of a gradient's norm
FAST = {("EP 8", 4, "report")}
MESHES = [cell for cell in CELLS if cell != "one device"]
# Micro-batches and rematerialisation go round the layouts; all combinations, without FP8, are `test_invariance`'s.
HOW = (1, "none"), (4, "report"), (1, "report"), (4, "none")
MATRIX = [(cell, *HOW[i % len(HOW)]) for i, cell in enumerate(MESHES)]


@cache
def reference(fp8):
    config = cell_config("one device", fp8=fp8)
    cell = Cell(config)
    state = first_state(config_of_state())
    return cell.run(state, [30]), cell.run(skewed(state, config), [30])


def config_of_state():
    return cell_config("one device", seed=SEED)


def relative(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_near(actual, expected, tolerance):
    np.testing.assert_array_equal(actual.indices, expected.indices)
    np.testing.assert_array_equal(actual.load, expected.load)
    np.testing.assert_array_equal(actual.bias, expected.bias)
    assert relative(actual.loss, expected.loss) < 1e-5
    errors = jax.tree.map(relative, actual.gradients, expected.gradients)
    worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda leaf: leaf[1])
    assert worst[1] < tolerance, worst


@pytest.mark.parametrize(
    ("cell", "micro_batches", "remat"),
    [pytest.param(*c, id=" ".join(map(str, c)), marks=[] if c in FAST else [pytest.mark.slow]) for c in MATRIX],
)
def test_a_step_in_fp8_is_that_of_one_device(cell, micro_batches, remat):
    config = cell_config(cell, micro_batches, remat, fp8=EXACT)
    compiled, state = Cell(config), first_state(config_of_state())
    even, uneven = reference(EXACT)
    assert_near(compiled.run(state, [30]), even, FEW_FLIPS)
    assert_near(compiled.run(skewed(state, config), [30]), uneven, FEW_FLIPS)  # many rounds of the exchange


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["EP 8", "DP 2 x EP 4"])
def test_with_the_report_s_scales_choices_are_equal_and_only_wgrad_rounds_otherwise(cell):
    compiled = Cell(cell_config(cell, 1, "report", fp8="report"))
    assert_near(compiled.run(first_state(config_of_state()), [30]), reference("report")[0], WGRAD)


@pytest.mark.slow
def test_micro_batches_and_rematerialisation_change_nothing_but_rounding():
    even = reference(EXACT)[0]
    for n, remat in ((4, "none"), (1, "report"), (4, "full")):
        compiled = Cell(cell_config("one device", n, remat, fp8=EXACT))
        assert_near(compiled.run(first_state(config_of_state()), [30]), even, FEW_FLIPS)


def test_delayed_scaling_is_refused_on_a_mesh():
    with pytest.raises(ValueError, match="delayed scaling runs on one device"):
        config = cell_config("EP 8", fp8='{"scaling": "delayed"}')
        Cell(config).put(first_state(config_of_state()))
