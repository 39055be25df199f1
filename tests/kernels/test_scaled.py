"""The scaled FP8 products: every implementation against float64 NumPy, a tile and a group at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.fp8.accumulate import Accumulation, product
from dsv3_jax.fp8.formats import E4M3, E5M2, E5M6
from dsv3_jax.fp8.quantize import Quantised, Quantiser
from dsv3_jax.kernels.scaled import pallas_gpu, pallas_tpu
from dsv3_jax.kernels.scaled.api import (
    grouped_scaled_outer,
    grouped_scaled_product,
    scaled_product,
    scaled_product_transposed,
)
from oracles import numpy_fp8
from oracles.accelerators import HERE
from oracles.compiling import quick_jit
from oracles.unchecked import unchecked

IMPLEMENTATIONS = ["reference", "pallas_tpu:interpret", "pallas_gpu:interpret", *HERE]
ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
SHAPES = [(1, 1, 1), (5, 130, 7), (200, 300, 150), (130, 128, 300), (40, 700, 129)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks along every side already of small operands."""
    small = pallas_tpu.Blocks(128, 256, 256, 128, 128, unroll=2)
    monkeypatch.setattr(pallas_tpu, "BLOCKS", (small, small._replace(rows=256, inner=128, height=64, unroll=2)))
    monkeypatch.setattr(pallas_gpu, "PRODUCTS", pallas_gpu.Blocks(32, 64, warps=4, stages=2))
    monkeypatch.setattr(pallas_gpu, "OUTER", pallas_gpu.Blocks(32, 64, warps=4, stages=2))


def numbers(rng, shape, size=1.0):
    """Rows and columns of very different size."""
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-6, 7, (*shape[:-1], 1)) * 2.0 ** rng.integers(-3, 4, shape[-1:])
    return size * x


def narrow(x, tile, form=E4M3, bits=False):
    """Quantised by NumPy, a matrix or a stack: in the format's dtype, or values and scales as bytes."""
    how = Quantiser(form, tile, power_of_two=bits, floor=1e-30)
    scales = [-(-size // side) for size, side in zip(x.shape[-2:], tile, strict=True)]
    values, scale = np.zeros(x.shape), np.zeros([*x.shape[:-2], *scales])
    for at in np.ndindex(x.shape[:-2] if x.size else (0,)):
        values[at], scale[at] = numpy_fp8.quantise(x[at], how)
    values, scale = values.astype(form.dtype), scale.astype(np.float32)
    if bits:
        values, scale = values.view(np.uint8), (scale.view(np.uint32) >> 23).astype(np.uint8)
    return Quantised(values, scale, x.shape[-2:], tile, form)


def wide(matrix):
    """The numbers, float64, of a matrix or a stack."""
    values, scale = np.asarray(matrix.values), np.asarray(matrix.scale)
    if scale.dtype == np.uint8:
        values, scale = values.view(matrix.form.dtype), (scale.astype(np.uint32) << 23).view(np.float32)
    if values.ndim == 3:
        return np.stack([wide(replace(matrix, values=v, scale=s)) for v, s in zip(values, scale, strict=True)])
    return values.astype(np.float64) * numpy_fp8.spread(scale.astype(np.float64), values.shape, matrix.tile)


def numpy_grouped(a, b, count):
    y, first = np.zeros((len(a), b.shape[2])), 0
    for matrix, n in zip(b, count, strict=True):
        y[first : first + n] = a[first : first + n] @ matrix
        first += n
    return y


def numpy_outer(x, y, count):
    ends = np.cumsum(count)
    return np.stack([x[:, end - n : end] @ y[end - n : end] for end, n in zip(ends, count, strict=True)])


def near(found, expected, magnitudes, terms, dtype):
    """Within float32's roundings of a sum of `terms` numbers whose magnitudes add up to these: one an addition, and four of
    their scales; bfloat16 rounds once more. Below float32's smallest numbers nothing is asked for."""
    found = np.asarray(found).astype(np.float64)
    assert found.shape == expected.shape and np.isfinite(found).all()
    allowed = magnitudes * ((terms + 4) * 2.0**-24 + (2.0**-8 if dtype == jnp.bfloat16 else 0)) + 2.0**-126
    assert (np.abs(found - expected) <= allowed).all()


def check(run, a, b, expected, terms, dtype):
    """`expected`: of the numbers in float64; of their magnitudes it is what sums are allowed to err by."""
    found = quick_jit(run)(a, b)
    assert found.dtype == dtype
    near(found, expected(wide(a), wide(b)), expected(*(np.abs(wide(v)) for v in (a, b))), terms, dtype)


def plain(a, b, implementation):
    return quick_jit(lambda a, b: scaled_product(a, b, dtype=jnp.float32, implementation=implementation))(a, b)


def check_plain(implementation, shape, kind, forms, bits, dtype, seed, size=1.0):
    (m, k, n), rng = shape, np.random.default_rng(seed)
    a = narrow(numbers(rng, (m, k), size), ROW, forms[0], bits)
    b = narrow(numbers(rng, (n, k) if kind == "transposed" else (k, n)), COLUMN if kind == "columns" else BLOCK, forms[1], bits)
    run = scaled_product_transposed if kind == "transposed" else scaled_product

    def expected(a, b):
        return a @ (b.T if kind == "transposed" else b)

    check(lambda a, b: run(a, b, dtype=dtype, implementation=implementation), a, b, expected, k, dtype)


def poisoned(matrix, used, axis):
    """NaN in every row, or column, from `used` on, and in their scales."""
    at = (slice(None),) * axis + (slice(used, None),)
    tiles = (slice(None),) * axis + (slice(-(-used // matrix.tile[axis]), None),)
    values, scale = matrix.values.copy(), matrix.scale.copy()
    values[at] = scale[tiles] = np.nan
    return replace(matrix, values=values, scale=scale)


def check_grouped(implementation, counts, more, sides, transposed, dtype, seed):
    (k, n), rng, rows = sides, np.random.default_rng(seed), sum(counts) + more
    clean = narrow(numbers(rng, (rows, k)), ROW)
    b = narrow(numbers(rng, (len(counts), *((n, k) if transposed else (k, n)))), BLOCK)
    count = jnp.asarray(counts, jnp.int32)

    def run(a, b):
        return grouped_scaled_product(a, b, count, transposed=transposed, dtype=dtype, implementation=implementation)

    def expected(a, b):
        return numpy_grouped(a, b.swapaxes(1, 2) if transposed else b, counts)

    near(
        quick_jit(run)(poisoned(clean, sum(counts), 0), b), expected(wide(clean), wide(b)),
        expected(np.abs(wide(clean)), np.abs(wide(b))), k, dtype,
    )  # fmt: skip


def check_outer(implementation, tiles, more, sides, forms, dtype, seed):
    (i, o), rng, counts = sides, np.random.default_rng(seed), [128 * n for n in tiles]
    rows = sum(counts) + more
    x, y = narrow(numbers(rng, (i, rows)), ROW, forms[0]), narrow(numbers(rng, (rows, o)), COLUMN, forms[1])
    count = jnp.asarray(counts, jnp.int32)

    def run(x, y):
        return grouped_scaled_outer(x, y, count, dtype=dtype, implementation=implementation)

    found = quick_jit(run)(poisoned(x, sum(counts), 1), poisoned(y, sum(counts), 0))
    magnitudes = numpy_outer(np.abs(wide(x)), np.abs(wide(y)), counts)
    near(found, numpy_outer(wide(x), wide(y), counts), magnitudes, max(rows, 1), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["blocks", "columns", "transposed"])
def test_one_product(implementation, kind):
    forms = (E5M2, E4M3) if kind == "columns" else (E4M3, E4M3)
    check_plain(implementation, (150, 300, 140), kind, forms, kind == "blocks", jnp.float32, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_meet_their_own_group_s_matrix(implementation):
    check_grouped(implementation, [20, 0, 133, 1], 40, (270, 150), True, jnp.bfloat16, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tiles_of_rows_are_added_up_in_their_own_group(implementation):
    check_outer(implementation, [1, 0, 3], 50, (150, 140), (E4M3, E5M2), jnp.float32, 0)


FORMS = st.sampled_from([(E4M3, E4M3), (E5M2, E5M2), (E4M3, E5M2), (E5M2, E4M3)])
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), kind=st.sampled_from(["blocks", "columns", "transposed"]), forms=FORMS, bits=st.booleans(),
    dtype=DTYPES, seed=st.integers(0, 2**16), size=st.sampled_from([1e-12, 1.0, 1e12]),
)  # fmt: skip
def test_any_product(implementation, shape, kind, forms, bits, dtype, seed, size):
    check_plain(implementation, shape, kind, forms, bits, dtype, seed, size)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 5), st.integers(100, 200)), min_size=1, max_size=4),
    more=st.integers(0, 40), sides=st.sampled_from([(1, 1), (130, 5), (256, 300), (600, 129)]), transposed=st.booleans(),
    dtype=DTYPES, seed=st.integers(0, 2**16),
)  # fmt: skip
def test_rows_of_any_groups_meet_their_own_matrix(implementation, counts, more, sides, transposed, dtype, seed):
    check_grouped(implementation, counts, more, sides, transposed, dtype, seed)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, deadline=None)
@given(
    tiles=st.lists(st.integers(0, 3), min_size=1, max_size=4), more=st.sampled_from([0, 1, 128, 200]),
    sides=st.sampled_from([(1, 1), (130, 5), (160, 300), (300, 129)]), forms=FORMS, dtype=DTYPES, seed=st.integers(0, 2**16),
)  # fmt: skip
def test_tiles_of_any_groups_are_added_up_in_their_own(implementation, tiles, more, sides, forms, dtype, seed):
    check_outer(implementation, tiles, more, sides, forms, dtype, seed)


def whole_numbers(rng, shape, tile):
    """Small integers with scales that are powers of two: of their products' sums float32 loses nothing."""
    scales = [-(-size // side) for size, side in zip(shape, tile, strict=True)]
    values, scale = rng.integers(-4, 5, shape).astype(E4M3.dtype), 2.0 ** rng.integers(-2, 3, scales)
    return Quantised(values, scale.astype(np.float32), shape, tile)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_float32_holds_is_exact(implementation):
    rng = np.random.default_rng(0)
    a, b = whole_numbers(rng, (50, 200), ROW), whole_numbers(rng, (200, 140), BLOCK)
    np.testing.assert_array_equal(plain(a, b, implementation), wide(a) @ wide(b))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_every_number_of_a_format_is_itself(implementation, form):
    """The smallest and the largest, zeros and NaN of both signs, in rows and in weights."""
    every = np.arange(256, dtype=np.uint8).view(form.dtype)
    every = every[~np.isinf(every.astype(np.float32))]
    one, n = np.zeros((1, 128), form.dtype), len(every)
    one[0, 0] = 1
    many = np.zeros((n, 128), form.dtype)
    many[:, 0] = every
    rows, columns = (Quantised(v, np.ones((len(v), 1), np.float32), v.shape, ROW, form) for v in (many, one))
    for a, values in ((rows, one.T), (columns, many.T)):
        b = Quantised(values, np.ones((1, -(-values.shape[1] // 128)), np.float32), values.shape, BLOCK, form)
        np.testing.assert_array_equal(plain(a, b, implementation).ravel(), every.astype(np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_the_model_s_product_and_near_the_unrounded_one(implementation):
    """DeepGEMM's measure of nearness, and its limit."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape) for shape in ((64, 384), (384, 130)))
    a, b = narrow(x, ROW), narrow(w, BLOCK)
    found = np.asarray(plain(a, b, implementation), np.float64)
    exact = x @ w
    assert 0 < 1 - 2 * np.vdot(found, exact) / (np.vdot(found, found) + np.vdot(exact, exact)) < 1e-3
    same = np.asarray(quick_jit(lambda a, b: product(a, b, Accumulation()))(a, b), np.float64)
    allowed = 384 * 2.0**-23 * (np.abs(wide(a)) @ np.abs(wide(b)))  # both are within half of it
    assert (np.abs(found - same) <= allowed).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scale_that_is_nan_makes_its_own_rows_and_columns_nan(implementation):
    rng = np.random.default_rng(0)
    a, b = narrow(numbers(rng, (20, 300)), ROW), narrow(numbers(rng, (300, 200)), BLOCK)
    a.scale[3, 2] = b.scale[1, 1] = np.nan
    found = np.isnan(plain(a, b, implementation))
    expected = np.zeros((20, 200), bool)
    expected[3] = expected[:, 128:] = True
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_gives_nothing_and_has_no_gradient(implementation):
    for m, k, n in ((0, 200, 130), (3, 0, 130), (3, 200, 0)):
        a, b = (Quantised(jnp.zeros(s, E4M3.dtype), jnp.ones([-(-s[0] // t[0]), -(-s[1] // t[1])]), s, t)
                for s, t in (((m, k), ROW), ((k, n), BLOCK)))  # fmt: skip
        found = scaled_product(a, b, dtype=jnp.float32, implementation=implementation)
        np.testing.assert_array_equal(found, np.zeros((m, n)))

    def loss(scale):
        a = Quantised(jnp.ones((2, 128), E4M3.dtype), scale, (2, 128), ROW)
        b = Quantised(jnp.ones((128, 128), E4M3.dtype), jnp.ones((1, 1)), (128, 128), BLOCK)
        return scaled_product(a, b, dtype=jnp.float32, implementation=implementation).sum()

    np.testing.assert_array_equal(quick_jit(jax.grad(loss))(jnp.ones((2, 1))), np.zeros((2, 1)))


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
def test_on_simulated_memory_without_a_race():
    """NaN in everything that was not written, an error for reads outside; races are counted."""
    check_grouped("pallas_tpu:simulate", [20, 0, 133, 1], 40, (270, 150), False, jnp.float32, 0)
    check_grouped("pallas_tpu:simulate", [0, 150], 0, (600, 130), True, jnp.float32, 0)
    check_outer("pallas_tpu:simulate", [1, 0, 2], 0, (150, 140), (E4M3, E4M3), jnp.float32, 0)


A, B = (Quantised(jnp.ones(s, E4M3.dtype), jnp.ones(n), s, t) for s, n, t in (((4, 8), (4, 1), ROW), ((8, 6), (1, 1), BLOCK)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "deepgemm"}, "implementation: expected one of reference, pallas_tpu, pallas_gpu"),
        ({"implementation": "reference:interpret"}, "implementation: expected one of"),
        ({"dtype": jnp.float16}, "dtype: expected float32 or bfloat16"),
        ({"a": replace(A, tile=COLUMN)}, "a: expected tiles 1 x 128, got"),
        ({"b": replace(B, tile=(0, 0))}, "b: expected tiles 128 x 128 or 128 x 1, got"),
        ({"a": replace(A, form=E5M6)}, "a: expected a format of 8 bits"),
        ({"a": replace(A, form=E5M2)}, "a: expected values in e5m2's dtype or as bytes, got float8_e4m3fn"),
        ({"a": A.wide()}, "a: expected values in e4m3's dtype or as bytes, got float32"),
        ({"a": replace(A, scale=jnp.ones((4, 2)))}, r"a: expected scales \[4, 1\] for its tiles, got \[4, 2\]"),
        ({"a": replace(A, scale=jnp.ones((4, 1), jnp.bfloat16))}, "a: expected scales in float32 or UE8M0"),
        ({"b": replace(B, values=B.values[:7])}, r"b: expected \[8, N\] for a \[4, 8\], got \[7, 6\]"),
        ({"b": replace(B, values=B.values[None])}, "b: expected values of 2 axes"),
    ],
)
def test_wrong_operands_are_one_line(change, message):
    operands = {"a": A, "b": B, "dtype": jnp.float32, "implementation": "reference"} | change
    with pytest.raises(ValueError, match=message) as error:
        unchecked(lambda: scaled_product(operands.pop("a"), operands.pop("b"), **operands))
    assert "\n" not in str(error.value)


def test_groups_that_do_not_fit_are_one_line():
    stack, count = replace(B, values=B.values[None], scale=B.scale[None]), jnp.array([1, 2])
    with pytest.raises(ValueError, match=r"b: expected \[2, 8, N\], got \[1, 8, 6\]"):
        unchecked(lambda: grouped_scaled_product(A, stack, count, dtype=jnp.float32, implementation="reference"))
    y = replace(B, tile=COLUMN, scale=jnp.ones((1, 6)), values=B.values[:7])
    with pytest.raises(ValueError, match=r"y: expected \[8, O\] for x \[4, 8\], got \[7, 6\]"):
        unchecked(lambda: grouped_scaled_outer(A, y, count, dtype=jnp.float32, implementation="reference"))
