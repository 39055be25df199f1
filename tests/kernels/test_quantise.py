"""Quantisation in one pass: every implementation against NumPy one tile at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.fp8.formats import E4M3, E5M2, E5M6
from dsv3_jax.fp8.quantize import WHOLE, Quantiser
from dsv3_jax.kernels.quantise import pallas_gpu, pallas_tpu
from dsv3_jax.kernels.quantise.api import quantise, requantise_transposed, swiglu_quantise
from oracles import numpy_fp8
from oracles.accelerators import HERE
from oracles.compiling import quick_jit
from oracles.unchecked import unchecked

IMPLEMENTATIONS = ["reference", "pallas_tpu:interpret", "pallas_gpu:interpret", *HERE]
TILES = [(1, 128), (128, 1), (128, 128)]
SHAPES = [(1, 1), (5, 7), (200, 300), (300, 129), (2, 130, 257), (257, 128)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks along every side already of small operands."""
    small = pallas_tpu.Blocks(128, 128, unroll=1)
    monkeypatch.setattr(pallas_tpu, "BLOCKS", {t: small._replace(columns=128 if t[1] == 1 else 128 * 128) for t in TILES})
    monkeypatch.setattr(pallas_tpu, "TRANSPOSED", small)
    monkeypatch.setattr(
        pallas_gpu, "BLOCKS", {t: pallas_gpu.Blocks(max(t[0], 32), max(t[1], 32), warps=4) for t in TILES}
    )  # fmt: skip


def numbers(seed, shape, dtype=jnp.float32, spread=20):
    """Rows and columns of very different size, and zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, (*shape[:-1], 1))
    x = x * 2.0 ** rng.integers(-3, 4, (1,) * (len(shape) - 1) + shape[-1:])
    return jnp.asarray(np.where(rng.uniform(size=shape) < 0.1, 0, x), dtype)


def same(found, x, how):
    """Scales to the bit. Values too, but that some neighbour is allowed where x / s, of which compilers make x * (1 / s) if the
    tile has several rows, is within that rounding of the middle between two."""
    x, flat = np.asarray(x, np.float32), np.prod(x.shape[:-2], dtype=int)
    values, scales = np.asarray(found.values), np.asarray(found.scale)
    assert found.values.dtype == how.form.dtype and found.shape == x.shape and found.tile == how.tile
    if scales.dtype == np.uint8:
        scales = (scales.astype(np.uint32) << 23).view(np.float32)
    for i, matrix in enumerate(x.reshape(flat, *x.shape[-2:])):
        expected, expected_scales = numpy_fp8.quantise(matrix, how)
        ours, our_scales = (v.reshape(flat, *v.shape[-2:])[i] for v in (values, scales))
        np.testing.assert_array_equal(our_scales, expected_scales)
        zero = ours.astype(np.float32) == 0
        assert not np.signbit(ours.astype(np.float32)[zero]).any()
        ours, spread = ours.astype(np.float64), numpy_fp8.spread(expected_scales, matrix.shape, how.tile)
        other = ours != expected
        if how.tile[0] == 1 or how.power_of_two:
            assert not other.any()
        ratio = (matrix.astype(np.float64) / spread)[other]
        middle = (ours + expected)[other] / 2
        assert (np.abs(ratio - middle) <= 2.0**-23 * np.abs(ratio)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tile", "power_of_two"), [((1, 128), False), ((128, 1), True), ((128, 128), False)])
def test_a_matrix_is_that_of_numpy_one_tile_at_a_time(implementation, tile, power_of_two):
    form, dtype = (E4M3, jnp.bfloat16) if power_of_two else (E5M2, jnp.float32)
    how, x = Quantiser(form, tile, power_of_two, 1e-6), numbers(0, (140, 150), dtype)
    fn = quick_jit(lambda x: quantise(x, how, scale_bits=power_of_two, implementation=implementation))
    same(fn(x), x, how)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(
    how=st.builds(
        Quantiser, st.sampled_from([E4M3, E5M2]), st.sampled_from(TILES), st.booleans(), st.sampled_from([1e-4, 1e-30])
    ),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_matrices_are_those_of_numpy_one_tile_at_a_time(implementation, how, shape, dtype, seed):
    x = numbers(seed, shape, dtype)
    fn = quick_jit(lambda x: quantise(x, how, scale_bits=how.power_of_two, implementation=implementation))
    same(fn(x), x, how)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_makes_its_own_tile_nan_and_no_other(implementation):
    x = numbers(1, (140, 150), spread=1)
    for place, poison in (((131, 130), np.nan), ((3, 2), np.inf), ((4, 149), -np.inf)):
        x = x.at[place].set(poison)
    for tile in TILES:
        how = Quantiser(tile=tile)
        fn = quick_jit(lambda x, how=how: quantise(x, how, implementation=implementation).astype(jnp.float32))
        found = np.asarray(fn(x))
        for _, part in numpy_fp8.tiles(x.shape, tile):
            broken = not np.isfinite(np.asarray(x)[part]).all()
            assert np.isnan(found[part]).all() if broken else np.isfinite(found[part]).all()


def check_requantised(implementation, shape, power_of_two, as_bytes, seed):
    x = quantise(numbers(seed, shape), Quantiser(), implementation="reference")
    how = Quantiser(tile=(128, 1), power_of_two=power_of_two)
    given_x = x.packed() if as_bytes else x
    found = quick_jit(lambda x: requantise_transposed(x, how, scale_bits=power_of_two, implementation=implementation))(given_x)
    assert found.tile == (1, 128) and found.sides == shape[::-1] and found.scale.shape == (shape[1], -(-shape[0] // 128))
    wide = np.asarray(x.values, np.float32) * numpy_fp8.spread(np.asarray(x.scale), shape, (1, 128)).astype(np.float32)
    same(_untransposed(found), jnp.asarray(wide), how)


def _untransposed(matrix):
    return type(matrix)(matrix.values.T, matrix.scale.T, matrix.sides[::-1], matrix.tile[::-1], matrix.form)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_requantised_is_quantised_along_the_rows_and_transposed(implementation):
    check_requantised(implementation, (150, 140), True, True, 0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=6, deadline=None)
@given(shape=st.sampled_from([(1, 1), (130, 5), (300, 129), (257, 400)]), bits=st.booleans(), seed=st.integers(0, 2**16))
def test_any_matrix_is_requantised_along_the_rows_and_transposed(implementation, shape, bits, seed):
    check_requantised(implementation, shape, bits, not bits, seed)


def check_swiglu(implementation, shape, dtype, gated, seed):
    g, u = (numbers(seed + n, shape, dtype, spread=3) for n in range(2))
    gates = jnp.asarray(np.random.default_rng(seed).uniform(size=shape[0]), jnp.float32) if gated else None
    how = Quantiser()
    found = quick_jit(lambda *operands: swiglu_quantise(*operands[:2], how, *operands[2:], implementation=implementation))(
        g, u, gates
    )
    wide_g, wide_u = (np.asarray(v, np.float64) for v in (g, u))
    a = (
        wide_g
        / (1 + np.exp(-np.maximum(wide_g, -700)))
        * wide_u
        * (1 if gates is None else np.asarray(gates, np.float64)[:, None])
    )
    # SiLU in float32 is within some units of its last place, 2^-20 of the value, which is added to the rounding's own error.
    error = np.abs(np.asarray(found.astype(jnp.float32), np.float64) - a)
    largest = np.zeros(shape)
    for _, part in numpy_fp8.tiles(shape, (1, 128)):
        largest[part] = np.max(np.abs(a[part]))
    assert (error <= numpy_fp8.error_bound(a, how) + 2.0**-20 * largest).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_swiglu_is_rounded_once(implementation):
    check_swiglu(implementation, (40, 150), jnp.bfloat16, True, 0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=6, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (3, 128), (130, 300)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    gated=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_swiglu_is_rounded_once(implementation, shape, dtype, gated, seed):
    check_swiglu(implementation, shape, dtype, gated, seed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_gives_nothing_and_has_no_gradient(implementation):
    for tile in TILES:
        empty = quantise(jnp.zeros((0, 300)), Quantiser(tile=tile), implementation=implementation)
        assert empty.values.shape == (0, 300) and empty.scale.shape == (0, 3 if tile[1] == 128 else 300)
    gradient = jax.grad(lambda x: quantise(x, Quantiser(), implementation=implementation).astype(jnp.float32).sum())
    np.testing.assert_array_equal(gradient(jnp.ones((2, 128))), np.zeros((2, 128)))


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
def test_on_simulated_memory_without_a_race(tile):
    """NaN in everything that was not written, an error for reads outside; races are counted."""
    how, x = Quantiser(tile=tile), numbers(0, (200, 300), spread=3)
    same(quantise(x, how, implementation="pallas_tpu:simulate"), x, how)
    if tile == (128, 1):
        check_requantised("pallas_tpu:simulate", (200, 300), False, False, 0)
    if tile == (1, 128):
        check_swiglu("pallas_tpu:simulate", (40, 300), jnp.float32, True, 0)


def test_each_byte_moves_once(monkeypatch):
    """At the model's shapes and with the blocks that it runs with; of scales, some are transposed after the kernel."""
    monkeypatch.undo()

    def shaped(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, side, width = 32768, 7168, 2048
    for tile in TILES:
        for x in (
            shaped(jnp.bfloat16, 1, rows, side),
            shaped(jnp.float32, 8, width, side),
            shaped(jnp.bfloat16, 1, 1000, 18432),
        ):
            matrices, m, k = x.shape
            scales = matrices * -(-m // tile[0]) * -(-k // tile[1]) * 4
            least = matrices * m * k * (x.dtype.itemsize + 1) + scales
            assert least <= pallas_tpu.bytes_moved([x], Quantiser(tile=tile)) <= 1.001 * least
    pair = [shaped(jnp.bfloat16, 1, rows, width)] * 2
    assert pallas_tpu.bytes_moved(pair, Quantiser(), n_wide=2) == rows * width * 5 + rows * width // 128 * 4
    inputs = shaped(E4M3.dtype, 1, rows, side), shaped(jnp.float32, 1, rows, side // 128)
    least = rows * side * (1 + 1 + 8 / 128)
    assert least < pallas_tpu.bytes_moved(inputs, Quantiser(tile=(128, 1)), transposed=True) < 1.25 * least


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_on_a_mesh_results_vary_as_operands_do_and_interpreters_are_refused(implementation):
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])

    def traced(how):
        def one(x):
            tiles = quantise(x, Quantiser(), implementation=how)
            product = swiglu_quantise(x, x, Quantiser(), implementation=how)
            turned = requantise_transposed(tiles, Quantiser(tile=(128, 1)), implementation=how)
            arrays = jax.tree.leaves((tiles, product, turned))
            assert len(arrays) == 6 and all(jax.typeof(v).manual_axis_type.varying == {"rows"} for v in arrays)
            return arrays[:2]

        run = jax.shard_map(one, mesh=mesh, in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows"))
        return jax.eval_shape(run, jnp.ones((256, 384)))

    values, scales = traced(implementation)
    assert values.shape == (256, 384) and scales.shape == (256, 3)
    with pytest.raises(ValueError, match="implementation: expected one that is compiled on a mesh"):
        traced(implementation + ":interpret")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantise(jnp.ones((2, 2)), Quantiser(), implementation="cuda"), "implementation: expected one of reference"),
        (lambda: quantise(jnp.ones((2, 2)), Quantiser(tile=(WHOLE, WHOLE)), implementation="reference"), "how: expected tiles"),
        (
            lambda: quantise(jnp.ones((2, 2)), Quantiser(form=E5M6), implementation="reference"),
            "how: expected a format of 8 bits",
        ),
        (lambda: quantise(jnp.ones((2, 2)), Quantiser(), scale_bits=True, implementation="reference"), "scale_bits: expected"),
        (lambda: quantise(jnp.ones((2, 2), jnp.float16), Quantiser(), implementation="reference"), "x: expected float32 or"),
        (
            lambda: swiglu_quantise(jnp.ones((2, 2)), jnp.ones((2, 3)), Quantiser(), implementation="reference"),
            "u_RF: expected g's shape",
        ),
        (
            lambda: swiglu_quantise(jnp.ones((2, 2)), jnp.ones((2, 2)), Quantiser(), jnp.ones(3), implementation="reference"),
            "gates_R: expected float32",
        ),
        (
            lambda: requantise_transposed(
                quantise(jnp.ones((2, 2)), Quantiser(tile=(128, 1)), implementation="reference"),
                Quantiser(tile=(128, 1)),
                implementation="reference",
            ),
            "x: expected a matrix of one byte",
        ),
    ],
)
def test_wrong_operands_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        unchecked(call)
    assert "\n" not in str(error.value)
