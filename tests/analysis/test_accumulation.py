"""The accumulation's error over K: against whole numbers added up by hand, and what table, sentence and figure say of it."""

import math

import numpy as np
import pytest

from dsv3_jax.analysis import accumulation
from dsv3_jax.analysis.accumulation import METHODS
from dsv3_jax.analysis.figures import save


def added(pairs, aligned, interval):
    """The tensor core's sum in exact arithmetic (floats of 64 bits hold these numbers), promoted each `interval` products."""
    total = 0.0
    for start in range(0, len(pairs), interval):
        register, part = 0.0, pairs[start : start + interval]
        for group in range(0, len(part), 32):
            terms = [*part[group : group + 32], *([(register, 1.0)] if aligned else [])]
            largest = max((math.frexp(x)[1] + math.frexp(y)[1] - 2 for x, y in terms if x * y), default=0)
            cut = fourteen_bits(sum(fourteen_bits(x * y, largest) for x, y in terms), None if aligned else largest)
            register = cut if aligned else float(np.float32(register + cut))
        total = float(np.float32(total + register))
    return total


def fourteen_bits(x, exponent):
    """Cut towards zero below an exponent, or below its own."""
    unit = 2.0 ** ((math.frexp(x)[1] - 1 if exponent is None else exponent) - 13)
    return math.trunc(x / unit) * unit


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", accumulation.INPUTS)
def test_the_error_is_that_of_sums_added_up_by_hand(name, method):
    k, how = 512, METHODS[method]
    a, b = accumulation.operands(name, 3, k, seed=0)
    pairs = np.stack(np.broadcast_arrays(np.asarray(a.values, float)[:, None], np.asarray(b.values, float).T), axis=-1)
    products = pairs.prod(axis=-1)
    exact = products.sum(axis=-1)
    found = accumulation.error(a, b, how)
    if how.fidelity == "float32":
        # XLA's order of adding is its own: K roundings of 2^-24, of partial sums no larger than the sum of magnitudes.
        assert found <= k * 2**-24 * np.abs(products).sum(axis=-1).max() / np.abs(exact).max()
        return
    interval = how.interval if how.fidelity == "promoted" else k
    sums = np.array([[added(row, how.reading == "aligned", interval) for row in rows] for rows in pairs.tolist()])
    # The model's sums are float32 whose bits are counted, so both agree but for float32's own roundings.
    assert found == pytest.approx(np.abs(sums - exact).max() / np.abs(exact).max(), abs=2e-7)
    assert found > 1e-6 and np.unique(sums).size > 1


def test_operands_are_values_of_e4m3_that_reach_its_largest_and_differ_between_seeds_and_inputs():
    pairs = {(name, seed): accumulation.operands(name, 4, 64, seed) for name in accumulation.INPUTS for seed in (0, 1)}
    for (name, _), (a, b) in pairs.items():
        assert a.shape == (4, 64) and b.shape == (64, 4)
        for values in (np.asarray(a.values), np.asarray(b.values)):
            assert np.abs(values).max() == 448 and (values.min() < 0) == (name == "normal")
    assert len({np.asarray(a.values).tobytes() for a, _ in pairs.values()}) == 4


def test_up_to_the_interval_promotion_changes_nothing_and_beyond_it_lessens_the_error():
    errors = accumulation.measure(8, [64, 128, 512], seeds=2, show=False)
    for found in errors.values():
        for reading in accumulation.READINGS:
            without, promoted = (np.array(found[f"{kind}, {reading}"]) for kind in ("tensor core", "promoted"))
            assert without.shape == (3, 2)
            np.testing.assert_array_equal(without[:2], promoted[:2])
        assert (np.array(found["promoted, aligned"])[2] < np.array(found["tensor core, aligned"])[2]).all()
        assert (np.array(found["float32"])[2] < np.array(found["promoted, apart"])[2]).all()


def test_lengths_are_powers_of_two_from_one_group_on():
    assert accumulation.lengths(32) == [32] and accumulation.lengths(256) == [32, 64, 128, 256]
    for wrong in (0, 16, 48, -64):
        with pytest.raises(ValueError, match=f"--longest: expected a power of two from 32 on, got {wrong}"):
            accumulation.lengths(wrong)


def summary(ks=(2048, 4096), **errors):
    """Both inputs with these errors, of two seeds, at every K; others are 0.001."""
    rows = {method: [[errors.get(method.replace(", ", "_").replace(" ", "_"), 0.001)] * 2 for _ in ks] for method in METHODS}
    return accumulation.summarise({"normal": rows, "uniform": rows}, ks)


def test_the_summary_holds_mean_and_range_of_the_seeds():
    rows = {method: [[0.1, 0.3], [0.2, 0.2]] for method in METHODS}
    found = accumulation.summarise({"normal": rows}, [32, 64])
    assert found["k"] == [32, 64]
    one = found["errors"]["normal"]["float32"]
    np.testing.assert_allclose(one["mean"], [0.2, 0.2], rtol=1e-12)
    assert (one["low"], one["high"], one["seeds"]) == ([0.1, 0.2], [0.3, 0.2], [[0.1, 0.3], [0.2, 0.2]])


@pytest.mark.parametrize("error, near", [(0.0134, True), (0.0299, True), (0.0133, False), (0.0301, False)])
def test_the_sentence_says_which_reading_comes_within_a_factor_of_the_published_error(error, near):
    said = accumulation.verdict(summary(tensor_core_aligned=error))
    if near:
        assert "report's 2 %: aligned, normal inputs" in said and "; not: apart, normal inputs (0.1 %)" in said
    else:
        assert "nothing comes within a factor of 1.5" in said
    assert f"{error / 0.001:.3g} (aligned, normal)" in said and "1 (apart, uniform)" in said
    assert "\n" not in said and said.endswith(".")


def test_without_the_published_k_nothing_is_said_of_it():
    assert accumulation.verdict(summary(ks=(32, 64))) == "K = 4,096, where the report states an error, was not measured."


def test_errors_of_zero_have_a_sentence_and_a_figure(tmp_path):
    none = summary(**{method.replace(", ", "_").replace(" ", "_"): 0.0 for method in METHODS})
    assert "promotion divides the error by 1 (aligned, normal)" in accumulation.verdict(none)
    save(accumulation.draw(none, "none"), tmp_path / "none.png")
    assert "infinity (aligned, normal)" in accumulation.verdict(summary(promoted_aligned=0.0))


def test_the_table_fits_a_terminal_and_shows_the_range_where_it_matters():
    lines = accumulation.table(summary(ks=(2048, 4096, 8192), float32=3e-7)).splitlines()
    assert max(map(len, lines)) <= 80 and not any(line != line.rstrip() for line in lines)
    assert [line.split()[0] for line in lines[2:9]] == ["2,048", "4,096", "lowest", "highest", "8,192", "lowest", "highest"]
    assert lines[2].split()[1:] == ["1.0e-03"] * 4 + ["3.0e-07"]


def test_every_line_of_the_figure_has_a_marker_and_a_dash_of_its_own():
    figure = accumulation.draw(summary(), "title")
    for ax in figure.axes:
        lines = ax.get_lines()[: len(METHODS)]
        assert [line.get_label() for line in lines] == list(METHODS)
        assert len({line.get_marker() for line in lines}) == len(METHODS)
        assert len({str(line._unscaled_dash_pattern) for line in lines}) == len(METHODS)
        assert ax.get_xlabel() and ax.get_title() and (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        marks = [line for line in ax.get_lines() if list(line.get_xdata()) == [4096]]
        assert [list(mark.get_ydata()) for mark in marks] == [[0.02]]
    assert figure.axes[0].get_ylabel()
