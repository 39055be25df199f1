"""Rounding to narrow formats against ml_dtypes' casts and float64, on every bfloat16 and on every tie; packing round trips."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from dsv3_jax.fp8.formats import E4M3, E5M2, E5M6, FORMATS, pack, rounded, unpack
from oracles.numpy_fp8 import cast, nearest

ALL = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def values_of(form):
    """Every finite non-negative value, ascending, from the bits of the format or of float16."""
    if form is E5M6:
        return (np.arange(0x7C00 >> 4, dtype=np.uint16) << 4).view(np.float16).astype(np.float32)
    codes = np.arange(128, dtype=np.uint8).view({E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}[form])
    values = codes.astype(np.float32)
    return values[np.isfinite(values)]


def every_bfloat16():
    values = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16).astype(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize(
    ("form", "bits", "largest", "least_normal", "least", "count"),
    [
        (E4M3, 8, 448, 2**-6, 2**-9, 127),
        (E5M2, 8, 57344, 2**-14, 2**-16, 124),
        (E5M6, 12, 65024, 2**-14, 2**-20, 31 * 64),
    ],
    ids=FORMATS,
)
def test_a_format_has_its_published_range_and_number_of_values(form, bits, largest, least_normal, least, count):
    assert form.bits == bits and form.largest == largest and 2.0**form.least_exponent == least_normal
    # Bfloat16 has 7 bits of mantissa and a wide exponent: it holds every value of the three, so rounding it meets them all.
    x = every_bfloat16()
    reached = np.unique(np.asarray(rounded(jnp.asarray(x[x >= 0]), form)))
    assert len(reached) == count and reached[-1] == largest and reached[1] == least
    steps = np.diff(reached)
    below = reached[:-1] < least_normal
    assert (steps[below] == least).all() and steps[np.argmin(below)] == least  # the first normal step is as long


@ALL
def test_values_of_a_format_stay_as_they_are(form):
    values = np.concatenate([values_of(form), -values_of(form)])
    np.testing.assert_array_equal(rounded(jnp.asarray(values), form), values)


@ALL
def test_every_bfloat16_is_rounded_as_the_cast_rounds_it(form):
    x = every_bfloat16()
    np.testing.assert_array_equal(rounded(jnp.asarray(x), form), cast(x, form))
    np.testing.assert_array_equal(rounded(jnp.asarray(x).astype(jnp.bfloat16), form), cast(x, form))


@ALL
@pytest.mark.parametrize("compiled", [False, True])
def test_float32_of_many_exponents_is_rounded_as_the_cast_rounds_it(form, compiled):
    rng = np.random.default_rng(0)
    x = (rng.uniform(-2, 2, 200_000) * 2.0 ** rng.integers(-40, 20, 200_000)).astype(np.float32)
    function = jax.jit(rounded, static_argnums=1) if compiled else rounded
    np.testing.assert_array_equal(function(jnp.asarray(x), form), cast(x, form))


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_the_reference_in_float64_agrees_with_the_casts_it_stands_in_for(form):
    np.testing.assert_array_equal(nearest(every_bfloat16(), form), cast(every_bfloat16(), form))


@ALL
def test_a_tie_goes_to_the_even_neighbour_and_a_hair_beside_it_to_the_nearer(form):
    values = values_of(form)
    below, above = values[:-1], values[1:]
    tie = (below + above) / 2  # exact: one bit more
    even = np.where(np.arange(len(tie)) % 2 == 0, below, above)  # bits count upwards, so every second value is even
    for sign in (1, -1):
        for x, expected in ((tie, even), (np.nextafter(tie, 0), below), (np.nextafter(tie, np.float32(np.inf)), above)):
            np.testing.assert_array_equal(rounded(jnp.asarray(sign * x), form), sign * expected)


@ALL
def test_what_is_too_large_becomes_the_largest_value_and_nan_stays(form):
    beyond = np.nextafter(np.float32(form.largest), np.float32(np.inf))
    x = np.array([form.largest, beyond, 1.07 * form.largest, 1e38, np.inf], np.float32)
    np.testing.assert_array_equal(rounded(jnp.asarray(x), form), np.full(5, form.largest, np.float32))
    np.testing.assert_array_equal(rounded(jnp.asarray(-x), form), np.full(5, -form.largest, np.float32))
    assert np.isnan(rounded(jnp.float32(np.nan), form))


@ALL
def test_what_is_below_half_the_least_value_becomes_zero(form):
    least = values_of(form)[1]
    x = np.array([least / 2, np.nextafter(least / 2, np.float32(1)), 1e-38, 1e-45], np.float32)
    np.testing.assert_array_equal(rounded(jnp.asarray(x), form), [0, least, 0, 0])


@ALL
@pytest.mark.parametrize("drop", [0, 1])
def test_packing_keeps_every_value_its_sign_and_nan(form, drop):
    values = np.concatenate([values_of(form), -values_of(form), [np.nan]]).astype(np.float32)[drop:]
    packed = pack(jnp.asarray(values), form)
    assert packed.dtype == jnp.uint8 and packed.shape == (form.packed_size(len(values)),)
    back = np.asarray(unpack(packed, form, len(values)))
    np.testing.assert_array_equal(back, values)
    np.testing.assert_array_equal(np.signbit(back[:-1]), np.signbit(values[:-1]))  # of zeros, too


@ALL
@settings(max_examples=8)
@given(rows=st.lists(st.integers(1, 3), max_size=2), size=st.integers(0, 9))
def test_rows_are_packed_each_by_itself_whatever_their_length(form, rows, size):
    values = np.random.default_rng(size).choice(values_of(form), (*rows, size))
    packed = pack(jnp.asarray(values), form)
    assert packed.shape == (*rows, form.packed_size(size))
    np.testing.assert_array_equal(unpack(packed, form, size), values)


@ALL
def test_no_rows_are_packed_into_no_rows(form):
    packed = pack(jnp.zeros((0, 6)), form)
    assert packed.shape == (0, form.packed_size(6)) and unpack(packed, form, 6).shape == (0, 6)


def test_twelve_bits_a_value_are_float16_s_upper_ones_a_byte_each_and_then_two_halves_a_byte():
    assert [E5M6.packed_size(size) for size in (0, 1, 2, 3, 7168)] == [0, 2, 3, 5, 7168 * 3 // 2]
    values = np.random.default_rng(0).choice(values_of(E5M6), 7) * np.array([1, -1, 1, 1, -1, -1, 1], np.float32)
    packed = [int(byte) for byte in pack(jnp.asarray(values), E5M6)]
    for i, value in enumerate(values):
        low = packed[7 + i // 2] >> 4 * (i % 2) & 15
        assert np.array(packed[i] << 8 | low << 4, np.uint16).view(np.float16) == value


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_eight_bits_are_the_cast_s_own(form):
    values = np.concatenate([values_of(form), -values_of(form)])
    expected = values.astype(np.dtype(form.dtype)).view(np.uint8)
    np.testing.assert_array_equal(pack(jnp.asarray(values), form), expected)
