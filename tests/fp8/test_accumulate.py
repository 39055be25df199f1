"""Accumulation against a GPU's and loops over single products in float64, bit for bit; exact cases; what promotion is good for.

`h200_accumulation.npz` was measured on an NVIDIA H200: cuBLASLt's FP8 product a b^T of E4M3, results in float32, unit scales;
`fast` with fast accumulation and `slow` without. For each kind of operands (normal, uniform, random `bits`, a of `subnormal`
numbers) and K it has some rows of both operands, as bits, and their products.
"""

from pathlib import Path

import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from dsv3_jax.fp8.accumulate import Accumulation, product, tensor_core
from dsv3_jax.fp8.formats import E4M3, E5M2
from dsv3_jax.fp8.quantize import WHOLE, Quantised, Quantiser, quantise
from oracles import numpy_fp8
from oracles.compiling import quick_jit

READINGS = pytest.mark.parametrize("reading", ["aligned", "apart"])
EVERY_WAY = [
    Accumulation(),
    *(Accumulation(fidelity, reading) for fidelity in ("promoted", "tensor_core") for reading in ("aligned", "apart")),
]
core = quick_jit(tensor_core, static_argnums=3)
multiplied = quick_jit(product, static_argnums=2)
MEASURED = Path(__file__).parent / "h200_accumulation.npz"


def narrow(shape, form, seed, spread=3):
    """Values of a format, of very different size and some of them zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)
    return numpy_fp8.cast(x * (rng.random(shape) > 0.1), form).astype(np.float32)


@pytest.mark.parametrize("way, fidelity", [("fast", "tensor_core"), ("slow", "promoted")])
@pytest.mark.parametrize("k", [32, 64, 96, 128, 512, 4096])
def test_products_equal_a_gpu_s_bit_for_bit(k, way, fidelity):
    with np.load(MEASURED) as stored:
        measured = {name: stored[name] for name in stored.files}
    for kind in {name.split("_")[0] for name in measured if name.endswith(f"_{k}_{way}")}:
        a, b = (measured[f"{kind}_{k}_{side}"].view(ml_dtypes.float8_e4m3fn).astype(np.float32) for side in "ab")
        expected = measured[f"{kind}_{k}_{way}"]
        one, tile = jnp.ones((1, 1)), (WHOLE, WHOLE)
        got = multiplied(Quantised(a, one, a.shape, tile), Quantised(b.T, one, b.T.shape, tile), Accumulation(fidelity))
        assert expected.shape == (len(a), len(b)) and np.unique(expected).size > 3
        np.testing.assert_array_equal(np.asarray(got).view(np.uint32), expected.view(np.uint32), err_msg=kind)


@READINGS
@settings(max_examples=8)
@given(
    m=st.integers(1, 3),
    k=st.sampled_from([1, 31, 33, 64, 200]),
    n=st.integers(1, 3),
    form=st.sampled_from([E4M3, E5M2]),
    seed=st.integers(0, 99),
    starts=st.booleans(),
)
def test_the_tensor_core_s_sum_equals_a_loop_s_bit_for_bit(reading, m, k, n, form, seed, starts):
    a, b = narrow((m, k), form, seed), narrow((k, n), form, seed + 1)
    start = np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32) * starts
    got = core(jnp.asarray(a), jnp.asarray(b), jnp.asarray(start), reading)
    np.testing.assert_array_equal(got, numpy_fp8.tensor_core(a, b, start, reading))


def test_the_two_readings_differ_where_the_accumulator_is_large():
    ones = jnp.ones((1, 32)), jnp.ones((32, 1)) * 0.75
    start = jnp.full((1, 1), 2.0**14)
    # The unit of 14 bits below 2^14 is 2: each product of 0.75 falls off. By themselves they sum to 24.
    assert core(*ones, start, "aligned").item() == 2**14
    assert core(*ones, start, "apart").item() == 2**14 + 24


@READINGS
def test_products_are_cut_off_towards_zero_at_fourteen_bits(reading):
    # 1, and products of 2^-13 (kept: the last of 14 bits) or 1.875 * 2^-14 (cut off): x 31 of either sign
    for small, kept in ((2.0**-13, 1.0), (1.875 * 2**-14, 0.0), (1.875 * 2**-13, 1 / 1.875)):
        for sign in (1, -1):
            b = np.full((32, 1), sign * small, np.float32)
            b[7] = sign
            got = core(jnp.ones((1, 32)), jnp.asarray(b), jnp.zeros((1, 1)), reading).item()
            assert got == sign * (1 + 31 * small * kept)


def test_a_product_s_exponent_is_the_sum_of_its_operands_and_the_accumulator_keeps_fourteen_bits():
    a, b = np.ones((1, 32), np.float32), np.full((32, 1), 2.0**-13, np.float32)
    a[0, 3] = b[3] = 1.5
    for sign in (1, -1):
        operands = jnp.asarray(a), jnp.asarray(sign * b), jnp.zeros((1, 1))
        sums = {reading: core(*operands, reading).item() for reading in ("aligned", "apart")}
        # 1.5 x 1.5 = 2.25 has the exponent 0, so 31 products of 2^-13 are kept; of their sum 2^-12 is the last of 14 bits.
        assert sums == {"aligned": sign * (2.25 + 15 * 2.0**-12), "apart": sign * (2.25 + 31 * 2.0**-13)}


@READINGS
def test_zeros_have_no_exponent(reading):
    a, b = np.zeros((1, 32), np.float32), np.full((32, 1), 256, np.float32)
    a[0, 0], b[0], b[1:9] = 2.0**-9, 2.0**-9, 0
    assert core(jnp.asarray(a), jnp.asarray(b), jnp.zeros((1, 1)), reading).item() == 2.0**-18


@READINGS
def test_numbers_of_any_size_are_added_alike_until_float32_ends(reading):
    a, b, zeros = narrow((3, 64), E4M3, 0), narrow((64, 4), E4M3, 1), np.zeros((3, 4), np.float32)
    expected = numpy_fp8.tensor_core(a, b, zeros, reading)
    for exponent in (-44, 57):  # of a's and of b's numbers: products from 2^-101 to 2^122
        scale = np.float32(2.0**exponent)
        np.testing.assert_array_equal(core(a * scale, b * scale, zeros, reading), expected * scale * scale)
    np.testing.assert_array_equal(core(a * np.float32(2.0**-90), b * np.float32(2.0**-90), zeros, reading), zeros)


@pytest.mark.parametrize("how", EVERY_WAY, ids=str)
@pytest.mark.parametrize("tile", [8, WHOLE])
def test_small_integers_and_powers_of_two_are_exact_in_every_fidelity(how, tile):
    rng = np.random.default_rng(0)
    a = Quantiser(tile=(1 if tile else WHOLE, tile), power_of_two=True)
    b = Quantiser(tile=(tile, tile), power_of_two=True)
    for draw in (lambda *s: rng.integers(-3, 4, s), lambda *s: rng.choice([-1, 1], s) * 2.0 ** rng.integers(-1, 2, s)):
        x, y = draw(5, 203).astype(np.float32), draw(203, 6).astype(np.float32)
        got = multiplied(quantise(jnp.asarray(x), a), quantise(jnp.asarray(y), b), how)
        np.testing.assert_array_equal(got, x.astype(np.float64) @ y)


def operands(m, k, n, tile, seed=0, power_of_two=False):
    rng = np.random.default_rng(seed)
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n)))
    return (
        quantise(jnp.asarray(x), Quantiser(tile=(1, tile), power_of_two=power_of_two)),
        quantise(jnp.asarray(y), Quantiser(tile=(tile, tile), power_of_two=power_of_two)),
    )


def numbers(*matrices):
    return [np.asarray(matrix.astype(jnp.float32)) for matrix in matrices]


@READINGS
@pytest.mark.parametrize(("k", "tile", "interval"), [(300, 128, 128), (200, 128, 64), (90, WHOLE, 32)])
def test_promotion_adds_each_interval_s_sum_times_both_scales_to_a_float32_register(reading, k, tile, interval):
    a, b = operands(3, k, 5, tile)
    expected = np.zeros((3, 5), np.float32)
    for i in range(0, k, interval):
        values = np.asarray(a.values)[:, i : i + interval], np.asarray(b.values)[i : i + interval]
        part = numpy_fp8.tensor_core(*values, np.zeros((3, 5)), reading)
        j = i // (tile or k)
        b_scale = np.repeat(np.asarray(b.scale)[j], tile)[:5] if tile else np.asarray(b.scale)[0]
        expected += part * np.asarray(a.scale)[:, j : j + 1] * b_scale
    # Only whether a product and its sum are rounded once or twice may differ.
    np.testing.assert_allclose(multiplied(a, b, Accumulation("promoted", reading, interval)), expected, rtol=1e-6, atol=1e-6)


@READINGS
@pytest.mark.parametrize(("tile", "interval"), [(32, 128), (48, 32)])
def test_tiles_that_do_not_fill_an_interval_are_scaled_before_they_are_added(reading, tile, interval):
    a, b = operands(3, 200, 4, tile, power_of_two=True)
    x, y = numbers(a, b)
    expected = np.zeros((3, 4), np.float32)
    for i in range(0, 200, interval):
        expected += numpy_fp8.tensor_core(x[:, i : i + interval], y[i : i + interval], np.zeros((3, 4)), reading)
    np.testing.assert_array_equal(multiplied(a, b, Accumulation("promoted", reading, interval)), expected)


@READINGS
def test_without_promotion_the_numbers_themselves_are_added_over_all_of_k(reading):
    a, b = operands(3, 200, 4, 32)
    got = multiplied(a, b, Accumulation("tensor_core", reading))
    np.testing.assert_array_equal(got, numpy_fp8.tensor_core(*numbers(a, b), np.zeros((3, 4)), reading))


def test_float32_is_the_product_of_the_rounded_operands():
    a, b = operands(9, 300, 11, 128)
    x, y = (v.astype(np.float64) for v in numbers(a, b))
    # 300 products, each and each partial sum rounded to 24 bits
    assert (np.abs(np.asarray(multiplied(a, b, Accumulation())) - x @ y) <= 300 * 2**-24 * (np.abs(x) @ np.abs(y))).all()


@pytest.mark.parametrize("how", EVERY_WAY, ids=str)
def test_a_sum_goes_on_from_where_it_is_said_to_start(how):
    a, b = operands(3, 64, 4, 32)
    start = jnp.asarray(np.random.default_rng(5).standard_normal((3, 4)), jnp.float32)
    got = multiplied(a, b, how, start=start)
    if how.carries:
        expected = numpy_fp8.tensor_core(*numbers(a, b), start, how.reading)
        np.testing.assert_array_equal(got, expected)
    else:
        np.testing.assert_allclose(got, start + multiplied(a, b, how), rtol=1e-6, atol=1e-6)  # one rounding more or less
    assert how.carries == (how.fidelity == "tensor_core")


@READINGS
def test_a_product_in_two_parts_that_carries_equals_the_whole(reading):
    how, (first, second) = Accumulation("tensor_core", reading), (operands(3, 64, 4, 32, seed) for seed in (0, 1))
    (x0, y0), (x1, y1) = numbers(*first), numbers(*second)
    whole = numpy_fp8.tensor_core(np.hstack([x0, x1]), np.vstack([y0, y1]), np.zeros((3, 4)), reading)
    by_itself = numpy_fp8.tensor_core(x0, y0, np.zeros((3, 4)), reading)
    start = multiplied(*first, how)
    np.testing.assert_array_equal(start, by_itself)
    np.testing.assert_array_equal(multiplied(*second, how, start=start), whole)


@READINGS
def test_one_scale_for_all_of_k_is_applied_after_the_tensor_core_s_sum(reading):
    a, b = operands(3, 64, 4, WHOLE)
    values = numpy_fp8.tensor_core(np.asarray(a.values), np.asarray(b.values), np.zeros((3, 4)), reading)
    expected = values * np.asarray(a.scale) * np.asarray(b.scale)
    np.testing.assert_allclose(multiplied(a, b, Accumulation("tensor_core", reading)), expected, rtol=2**-22)


def test_promotion_every_128_products_cuts_the_error_over_4096_tenfold():
    for draw in ("standard_normal", "random"):
        rng = np.random.default_rng(0)
        x, y = (getattr(rng, draw)(shape).astype(np.float32) for shape in ((32, 4096), (4096, 32)))
        a, b = quantise(jnp.asarray(x), Quantiser()), quantise(jnp.asarray(y), Quantiser(tile=(128, 128)))
        reference = np.matmul(*(v.astype(np.float64) for v in numbers(a, b)))
        errors = {
            fidelity: np.max(np.abs(multiplied(a, b, Accumulation(fidelity)) - reference)) / np.max(np.abs(reference))
            for fidelity in ("float32", "promoted", "tensor_core")
        }
        assert errors["float32"] < 1e-5
        assert errors["float32"] < errors["promoted"] < errors["tensor_core"] / 10, (draw, errors)


@pytest.mark.parametrize("how", EVERY_WAY, ids=str)
def test_zeros_and_no_rows_give_zeros_and_no_rows(how):
    for rows in (0, 2):
        a, b = quantise(jnp.zeros((rows, 40)), Quantiser()), quantise(jnp.zeros((40, 3)), Quantiser(tile=(128, 128)))
        np.testing.assert_array_equal(multiplied(a, b, how), np.zeros((rows, 3)))


@READINGS
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_one_row_s_nan_stays_in_its_row(reading, poison):
    a, b = operands(3, 64, 4, 32)
    x = np.array(a.values)
    x[1, 40] = poison
    got = np.asarray(core(jnp.asarray(x), b.values, jnp.zeros((3, 4)), reading))
    np.testing.assert_array_equal(np.isfinite(got), np.array([[True], [False], [True]]).repeat(4, 1))


def test_different_tiles_along_k_are_refused_where_scales_are_applied_to_sums():
    a, b = quantise(jnp.ones((2, 64)), Quantiser(tile=(1, 32))), quantise(jnp.ones((64, 2)), Quantiser(tile=(16, 16)))
    for fidelity in ("promoted", "tensor_core"):
        with pytest.raises(ValueError, match="tiles along K.*32 and 16"):
            product(a, b, Accumulation(fidelity))
    np.testing.assert_allclose(multiplied(a, b, Accumulation()), np.full((2, 2), 64), rtol=1e-6)
