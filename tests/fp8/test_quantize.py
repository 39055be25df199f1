"""Quantisation in tiles against NumPy one tile at a time: scales, values, edges, what is broken, what is kept in bytes."""

from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dsv3_jax.fp8.formats import E4M3, E5M2, E5M6, FORMATS
from dsv3_jax.fp8.linear import packed
from dsv3_jax.fp8.quantize import WHOLE, Quantiser, quantise, raised, with_scale_bits
from oracles import numpy_fp8

quantised = jax.jit(quantise, static_argnums=1)


def normal(*shape, seed=0, spread=1):
    """Rows and columns of different size, `spread` powers of two apart in the standard deviation."""
    rng = np.random.default_rng(seed)
    rows, columns = (2.0 ** (spread * rng.standard_normal((*shape[:-2], side, 1))) for side in shape[-2:])
    return (rng.standard_normal(shape) * rows * np.swapaxes(columns, -1, -2)).astype(np.float32)


def scale_of_tile(amax, **how):
    x = np.zeros((1, 128), np.float32)
    x[0, 5] = -amax
    return quantise(jnp.asarray(x), Quantiser(**how)).scale.item()


def test_the_scale_maps_the_largest_magnitude_to_the_largest_value():
    assert scale_of_tile(448) == 1
    assert scale_of_tile(1000) == np.float32(1000) / np.float32(448) == np.float32(2.232142857)
    assert scale_of_tile(1000, power_of_two=True) == 4
    assert scale_of_tile(448, power_of_two=True) == 1  # one that is a power already is not raised
    assert scale_of_tile(57344, form=E5M2) == scale_of_tile(65024, form=E5M6) == 1


def test_a_tile_of_zeros_gives_zeros_with_the_floor_s_scale():
    assert scale_of_tile(0) == scale_of_tile(0.9e-4) == np.float32(2.232142857e-7)
    assert scale_of_tile(0.9e-4, floor=1e-30) == np.float32(0.9e-4) / np.float32(448)
    for power_of_two in (False, True):
        for floor in (1e-4, 1e-30):
            how = Quantiser(tile=(2, 2), power_of_two=power_of_two, floor=floor)
            matrix = quantise(jnp.zeros((3, 3)), how)
            np.testing.assert_array_equal(matrix.values, np.zeros((3, 3)))
            np.testing.assert_array_equal(matrix.astype(jnp.float32), np.zeros((3, 3)))
            assert (np.asarray(matrix.scale) > 0).all()


@pytest.mark.parametrize(
    ("shape", "tile", "scales"),
    [
        ((576, 7168), (128, 128), (5, 56)),
        ((129, 129), (128, 128), (2, 2)),
        ((128, 256), (128, 128), (1, 2)),
        ((5, 7), (128, 128), (1, 1)),
        ((576, 7168), (1, 128), (576, 56)),
        ((576, 7168), (128, 1), (5, 7168)),
        ((576, 7168), (WHOLE, WHOLE), (1, 1)),
        ((3, 2, 200, 130), (128, 1), (3, 2, 2, 130)),
        ((0, 200), (1, 128), (0, 2)),
        ((0, 200), (128, 1), (0, 200)),
    ],
)
def test_each_tile_has_one_scale(shape, tile, scales):
    got = jax.eval_shape(lambda x: quantise(x, Quantiser(tile=tile)), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert got.scale.shape == scales and got.values.shape == got.shape == shape


QUANTISERS = st.builds(
    Quantiser,
    form=st.sampled_from(list(FORMATS.values())),
    tile=st.sampled_from([(1, 8), (8, 1), (8, 8), (3, 5), (1, 1), (WHOLE, WHOLE), (WHOLE, 4), (1, 128), (128, 128)]),
    power_of_two=st.booleans(),
    floor=st.sampled_from([1e-4, 1e-30, 1.0]),
)


@settings(max_examples=25)
@given(how=QUANTISERS, m=st.integers(1, 20), k=st.integers(1, 20), seed=st.integers(0, 99))
def test_scales_and_values_equal_numpy_s_tile_for_tile(how, m, k, seed):
    x = normal(m, k, seed=seed, spread=4)
    got = quantised(jnp.asarray(x), how)
    values, scales = numpy_fp8.quantise(x, how, np.asarray(got.scale))
    np.testing.assert_array_equal(got.values, values)
    np.testing.assert_array_equal(got.astype(jnp.float32), values.astype(np.float32) * _spread(scales, x, how))
    # A division, or a product with the reciprocal: a unit in the last place.
    np.testing.assert_allclose(got.scale, numpy_fp8.quantise(x, how)[1], rtol=2**-23, atol=0)
    assert (np.abs(np.asarray(got.astype(jnp.float32)) - x) <= numpy_fp8.error_bound(x, how)).all()


def _spread(scales, x, how):
    return numpy_fp8.spread(scales, x.shape, how.tile).astype(np.float32)


def test_e4m3_s_error_is_a_sixteenth_of_a_value_or_half_the_least_one():
    x = normal(200, 300, spread=3)
    for how in (Quantiser(), Quantiser(tile=(128, 128)), Quantiser(tile=(128, 1), power_of_two=True)):
        matrix = quantised(jnp.asarray(x), how)
        s = numpy_fp8.spread(np.asarray(matrix.scale), x.shape, how.tile)
        error = np.abs(np.asarray(matrix.values, np.float64) * s - x)
        # x / s is rounded to float32 first, which may move it across a tie: 2^-24 of x
        assert (error <= np.maximum(2**-4 * np.abs(x), 2**-10 * s) + 2**-23 * np.abs(x)).all()
        assert (error > 0.9 * np.maximum(2**-4 * np.abs(x), 2**-10 * s)).any()  # and comes near it


@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128), (0, 0)])
def test_a_nan_in_a_large_matrix_is_not_lost_in_a_vectorised_maximum(tile):
    x = np.ones((256, 512), np.float32)
    x[130, 200] = np.nan
    got = np.asarray(quantise(jnp.asarray(x), Quantiser(tile=tile)).astype(jnp.float32))
    rows, columns = (side or size for side, size in zip(tile, x.shape, strict=True))
    i, j = 130 // rows * rows, 200 // columns * columns
    part = np.zeros(x.shape, bool)
    part[i : i + rows, j : j + columns] = True
    assert np.isnan(got[part]).all() and np.isfinite(got[~part]).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "how", [Quantiser(tile=(1, 8)), Quantiser(tile=(8, 1)), Quantiser(tile=(8, 8), power_of_two=True)], ids=str
)
def test_what_is_not_finite_makes_its_own_tile_nan_and_no_other(how, poison):
    x = normal(13, 19)
    x[9, 17] = poison
    matrix = quantised(jnp.asarray(x), how)
    for form in (matrix, packed(matrix, how)):
        got = np.asarray(form.astype(jnp.float32))
        for _, part in numpy_fp8.tiles(x.shape, how.tile):
            holds_it = not np.isfinite(x[part]).all()
            assert np.isnan(got[part]).all() if holds_it else np.isfinite(got[part]).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_delayed_scale_hides_nothing_that_is_not_finite(poison):
    """It would saturate, the step count as sound, and its infinite magnitude make every later step NaN."""
    x = np.ones((3, 5), np.float32)
    x[1, 2] = poison
    got = quantise(jnp.asarray(x), Quantiser(tile=(WHOLE, WHOLE)), jnp.float32(2.0))
    assert np.isnan(got.astype(jnp.float32)).all()


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (a.sides, a.tile, a.form) == (b.sides, b.tile, b.form)


@pytest.mark.parametrize("tile", [(1, 8), (8, 8), (WHOLE, WHOLE)])
def test_every_matrix_of_a_stack_is_quantised_as_if_it_were_alone(tile):
    x, how = normal(2, 3, 9, 17), Quantiser(tile=tile)
    stack = quantised(jnp.asarray(x), how)
    assert stack.shape == x.shape
    for i, j in np.ndindex(2, 3):
        alone = quantised(jnp.asarray(x[i, j]), how)
        same(replace(stack, values=stack.values[i, j], scale=stack.scale[i, j]), alone)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(9, 17), (2, 17, 9)])
def test_the_transpose_is_that_of_the_quantised_transpose(form, shape):
    x, how = normal(*shape), Quantiser(form, (1, 8))
    assert how.transposed == Quantiser(form, (8, 1)) and how.transposed.transposed == how
    matrix = quantised(jnp.asarray(x), how)
    across = quantised(jnp.asarray(np.swapaxes(x, -1, -2)), how.transposed)
    same(matrix.T, across)
    same(matrix.packed().T.wide(), across)  # bytes stay bytes, where a value has one
    same(matrix.T.T, matrix)
    np.testing.assert_array_equal(matrix.T.astype(jnp.float32), np.swapaxes(matrix.astype(jnp.float32), -1, -2))


def test_bfloat16_is_quantised_as_the_float32_that_it_is():
    x = jnp.asarray(normal(9, 17)).astype(jnp.bfloat16)
    same(quantised(x, Quantiser()), quantised(x.astype(jnp.float32), Quantiser()))
    half = quantised(x, Quantiser()).astype(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, quantised(x, Quantiser()).astype(jnp.float32).astype(jnp.bfloat16))


def test_raised_scales_are_powers_of_two_up_to_twice_as_large():
    scale = np.concatenate([2.0 ** np.arange(-126, 127), np.random.default_rng(0).uniform(1e-9, 9, 1000)]).astype(np.float32)
    scale = np.concatenate([scale, np.nextafter(scale, np.float32(0))[1:], np.nextafter(scale, np.float32(np.inf))])
    up = np.asarray(raised(jnp.asarray(scale)))
    assert (np.frexp(up)[0] == 0.5).all() and (up >= scale).all() and (up < 2 * scale.astype(np.float64)).all()
    assert np.isnan(raised(jnp.float32(np.nan))) and np.isinf(raised(jnp.float32(np.inf)))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_rounding_once_more_in_the_same_tiles_with_powers_of_two_changes_nothing(form):
    how = Quantiser(form, (1, 8), power_of_two=True, floor=1e-30)
    once = quantise(jnp.asarray(normal(50, 40, spread=6)), how).astype(jnp.float32)
    np.testing.assert_array_equal(quantise(once, how).astype(jnp.float32), once)


def test_powers_of_two_carry_over_from_rows_to_columns_without_error_and_others_do_not():
    x = normal(256, 200, spread=1)
    for power_of_two in (True, False):
        how = Quantiser(power_of_two=power_of_two)
        once = np.asarray(quantise(jnp.asarray(x), how).astype(jnp.float32))
        again = quantised(jnp.asarray(once), how.transposed)
        s = numpy_fp8.spread(np.asarray(again.scale), x.shape, (128, 1))
        is_normal = np.abs(once) >= s * 2**-6
        assert is_normal.mean() > 0.9
        exact = np.asarray(again.astype(jnp.float32)) == once
        if power_of_two:
            assert exact[is_normal].all()
        else:
            assert exact[is_normal].mean() < 0.5


@pytest.mark.parametrize("shape", [(5, 9), (3, 5, 8), (1, 1)])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_bytes_lose_nothing_and_are_as_many_as_stated(form, shape):
    matrix = quantised(jnp.asarray(normal(*shape)), Quantiser(form, (1, 4), power_of_two=True))
    rows, columns = np.prod(shape[:-1]), shape[-1]
    small = with_scale_bits(matrix).packed()
    assert small.values.dtype == small.scale.dtype == jnp.uint8
    assert small.values.nbytes == rows * form.packed_size(columns)
    assert small.scale.nbytes == rows * -(-columns // 4)
    assert small.shape == matrix.shape and small.ndim == len(shape)
    for got in (small, matrix.packed(), with_scale_bits(matrix)):
        same(got.wide(), matrix)
        np.testing.assert_array_equal(got.astype(jnp.float32), matrix.astype(jnp.float32))
    # UE8M0: the exponent with a bias of 127
    np.testing.assert_array_equal(2.0 ** (np.asarray(small.scale, np.float64) - 127), matrix.scale)


def test_scales_that_are_no_powers_of_two_stay_float32_when_packed():
    matrix = quantised(jnp.asarray(normal(5, 9)), Quantiser())
    assert matrix.packed().values.dtype == jnp.uint8 and matrix.packed().scale.dtype == jnp.float32
    same(matrix.packed().wide(), matrix)


def test_a_quantiser_says_what_it_does():
    assert str(Quantiser()) == "e4m3 1x128"
    assert str(Quantiser(E5M6, (WHOLE, WHOLE), power_of_two=True)) == "e5m6 tensor 2^n"
    assert str(Quantiser(E4M3, (WHOLE, 4))) == "e4m3 allx4"
