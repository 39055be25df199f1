"""A linear operation in FP8 against float64: of rounded operands up to float32, of exact ones up to the formats' error."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8.accumulate import Accumulation, product
from dsv3_jax.fp8.delayed import Delayed
from dsv3_jax.fp8.formats import E4M3, E5M2, E5M6, rounded
from dsv3_jax.fp8.linear import Products, dgrad, fprop, keep, linear, wgrad
from dsv3_jax.fp8.quantize import WHOLE, Quantised, Quantiser, quantise
from oracles import numpy_fp8
from oracles.compiling import quick_jit


def recipe(tile=128, **how):
    """The report's tiles."""
    x, weight = Quantiser(tile=(1, tile), floor=1e-30), Quantiser(tile=(tile, tile), floor=1e-30)
    return replace(Products(x, weight, x, x.transposed, x.transposed), **how)


def powers(tile=8):
    x, weight = Quantiser(tile=(1, tile), power_of_two=True), Quantiser(tile=(tile, tile), power_of_two=True)
    return Products(x, weight, x, x.transposed, x.transposed)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def float64(*arrays):
    return [np.asarray(a.astype(jnp.float32), np.float64) for a in arrays]


def case(m=37, k=150, n=141, dtype=jnp.float32):
    return normal(m, k, dtype=dtype), normal(k, n, seed=1), normal(m, n, seed=2, dtype=dtype)


def forward_and_gradients(x, weight, dy, how, kept=None):
    y, pull_back = jax.vjp(lambda x, weight: linear(x, weight, how, kept), x, weight)
    return [y, *pull_back(dy)]


run = quick_jit(forward_and_gradients, static_argnums=3)


@partial(quick_jit, static_argnums=3)
def three_products(x, weight, dy, how):
    """Every operand rounded once."""
    float32 = jnp.float32
    return fprop(quantise(x, how.x), weight, how, float32), dgrad(dy, weight, how, float32), wgrad(x, dy, how, float32)


# DeepGEMM's shapes, a sixteenth of each side
@pytest.mark.parametrize(("n", "k"), [(132, 448), (36, 448), (1536, 96), (2048, 32), (448, 1024), (256, 448), (448, 128)])
def test_deepgemm_s_difference_stays_below_a_thousandth_in_all_three_products(n, k):
    x, weight, dy = normal(201, k), normal(k, n, seed=1), normal(201, n, seed=2)
    x64, w64, dy64 = float64(x, weight, dy)
    for got, exact in zip(three_products(x, weight, dy, recipe()), (x64 @ w64, dy64 @ w64.T, x64.T @ dy64), strict=True):
        got = np.asarray(got, np.float64)
        difference = 1 - 2 * np.vdot(got, exact) / (np.vdot(got, got) + np.vdot(exact, exact))
        assert 1e-5 < difference < 1e-3  # and they are rounded


FLOAT32 = 2**-24
WAYS = {
    "report": recipe(),
    "ragged tiles": recipe(48),
    "powers of two": powers(48),
    "whole": recipe(WHOLE, x=Quantiser(tile=(WHOLE, WHOLE)), x_wgrad=Quantiser(tile=(WHOLE, WHOLE))),
    "gradient in e5m2": recipe(gradient=Quantiser(E5M2), gradient_wgrad=Quantiser(E5M2, (128, 1))),
    "kernels, gpu": recipe(implementation="pallas_gpu:interpret"),
    "kernels, tpu, gradient in e5m2": recipe(
        gradient=Quantiser(E5M2), gradient_wgrad=Quantiser(E5M2, (128, 1)), implementation="pallas_tpu:interpret"
    ),
    "gradient in blocks": recipe(gradient=Quantiser(tile=(128, 128)), gradient_wgrad=Quantiser(tile=(128, 128))),
}
every_way = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)


@every_way
@pytest.mark.parametrize("kept", [None, Quantiser(E5M6, (1, 128), True)], ids=["as_rounded", "e5m6"])
def test_forward_and_gradients_are_the_rounded_operands_products(how, kept):
    x, weight, dy = case()
    y, dx, dw = run(x, weight, dy, how, keep(x, kept) if kept else None)
    x_fprop, w = numpy_fp8.rounded(x, how.x), numpy_fp8.rounded(weight, how.weight)
    x_wgrad = numpy_fp8.rounded(numpy_fp8.rounded(x, kept or how.x), how.x_wgrad)
    dy_dgrad, dy_wgrad = numpy_fp8.rounded(dy, how.gradient), numpy_fp8.rounded(dy, how.gradient_wgrad)
    for got, a, b in ((y, x_fprop, w), (dx, dy_dgrad, w.T), (dw, x_wgrad.T, dy_wgrad)):
        # K products and sums in float32
        bound = (a.shape[1] + 8) * FLOAT32 * (np.abs(a) @ np.abs(b))
        assert (np.abs(np.asarray(got, np.float64) - a @ b) <= bound).all()


@every_way
@pytest.mark.parametrize("kept", [None, Quantiser(E5M6, (1, 128), True)], ids=["as_rounded", "e5m6"])
def test_forward_and_gradients_are_within_the_formats_error_of_the_exact_ones(how, kept):
    x, weight, dy = case()
    y, dx, dw = run(x, weight, dy, how, keep(x, kept) if kept else None)
    x, weight, dy = float64(x, weight, dy)
    once = numpy_fp8.error_bound(x, kept or how.x)
    twice = once + numpy_fp8.error_bound(np.abs(x) + once, how.x_wgrad)  # the second rounding is of at most this
    w_error = numpy_fp8.error_bound(weight, how.weight)
    products = (
        (y, x, numpy_fp8.error_bound(x, how.x), weight, w_error),
        (dx, dy, numpy_fp8.error_bound(dy, how.gradient), weight.T, w_error.T),
        (dw, x.T, twice.T, dy, numpy_fp8.error_bound(dy, how.gradient_wgrad)),
    )
    for got, a, a_error, b, b_error in products:
        bound = a_error @ np.abs(b) + np.abs(a) @ b_error + a_error @ b_error
        error = np.abs(np.asarray(got, np.float64) - a @ b)
        assert (error <= bound + 1e-5 * (np.abs(a) @ np.abs(b))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_sees_e5m6_s_finer_rounding_only_in_the_weight_s_gradient(dtype):
    x, weight, dy = case(dtype=dtype)
    how, fine = recipe(), Quantiser(E5M6, (1, 128), True)
    plain, kept = (run(x, weight, dy, how, k) for k in (None, keep(x.astype(jnp.float32), fine)))
    for i in (0, 1):
        np.testing.assert_array_equal(plain[i], kept[i])
    exact = np.matmul(*(a if i else a.T for i, a in enumerate(float64(x, dy))))
    coarse_error, fine_error = (np.linalg.norm(np.asarray(r[2], np.float64) - exact) for r in (plain, kept))
    assert fine_error < 0.9 * coarse_error  # three roundings to E4M3 become two


@pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16])
def test_y_and_dx_have_x_s_dtype_and_dw_the_weight_s_unrounded(weight_dtype):
    x, weight, dy = case(dtype=jnp.bfloat16)
    y, dx, dw = run(x, weight.astype(weight_dtype), dy, recipe())
    assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == weight_dtype
    if weight_dtype == jnp.float32:
        as_bfloat16 = np.asarray(dw.astype(jnp.bfloat16).astype(jnp.float32))
        assert (np.asarray(dw) != as_bfloat16).mean() > 0.9


def test_bfloat16_results_are_the_float32_ones_rounded_once():
    x, weight, dy = case(dtype=jnp.bfloat16)
    narrow, wide = run(x, weight, dy, recipe()), run(x.astype(jnp.float32), weight, dy.astype(jnp.float32), recipe())
    for got, expected in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(got, expected.astype(got.dtype))


@pytest.mark.parametrize(
    "accumulation", [Accumulation(), Accumulation("promoted", interval=32), Accumulation("tensor_core")], ids=str
)
def test_small_integers_and_powers_of_two_are_exact(accumulation):
    rng, how = np.random.default_rng(0), replace(powers(32), accumulation=accumulation)
    for draw in (lambda *s: rng.integers(-3, 4, s), lambda *s: rng.choice([-1, 1], s) * 2.0 ** rng.integers(-1, 2, s)):
        x, weight, dy = (jnp.asarray(draw(*shape), jnp.float32) for shape in ((19, 70), (70, 45), (19, 45)))
        x64, w64, dy64 = float64(x, weight, dy)
        for got, expected in zip(run(x, weight, dy, how), (x64 @ w64, dy64 @ w64.T, x64.T @ dy64), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("fidelity", ["promoted", "tensor_core"])
def test_all_three_products_accumulate_as_the_recipe_says(fidelity):
    how = recipe(32, accumulation=Accumulation(fidelity, interval=32))
    x, weight, dy = case(10, 70, 40)
    x8, w8 = quantise(x, how.x), quantise(weight, how.weight)
    operands = (
        (x8, w8),
        (quantise(dy, how.gradient), w8.T),
        (quantise(x8.astype(jnp.float32), how.x_wgrad).T, quantise(dy, how.gradient_wgrad)),
    )
    multiplied = quick_jit(product, static_argnums=2)
    for got, pair in zip(run(x, weight, dy, how), operands, strict=True):
        np.testing.assert_allclose(got, multiplied(*pair, how.accumulation), rtol=1e-6, atol=1e-6)
        assert (np.asarray(got) != np.asarray(multiplied(*pair, Accumulation()))).any()


def residuals(how, kept=None, dtype=jnp.bfloat16):
    x, weight, _ = case(dtype=dtype)

    def pull_back(x, weight, kept):
        return jax.vjp(lambda x, weight: linear(x, weight, how, kept), x, weight)[1]

    leaves = jax.tree.leaves(jax.eval_shape(pull_back, x, weight, kept))
    assert any(leaf.shape == weight.shape and leaf.dtype == weight.dtype for leaf in leaves)
    return [(leaf.shape, str(leaf.dtype)) for leaf in leaves if leaf.size and leaf.shape != weight.shape]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_between_forward_and_backward_x_takes_one_byte_a_value(dtype):
    assert sorted(residuals(recipe(), dtype=dtype)) == [((37, 2), "float32"), ((37, 150), "uint8")]
    assert sorted(residuals(powers(128), dtype=dtype)) == [((37, 2), "uint8"), ((37, 150), "uint8")]


def test_what_was_kept_in_e5m6_replaces_x():
    x, *_ = case()
    assert sorted(residuals(recipe(), keep(x, Quantiser(E5M6, (1, 128), True)))) == [((37, 2), "uint8"), ((37, 225), "uint8")]


def test_a_quantised_weight_is_multiplied_as_it_is():
    x, weight, _ = case()
    # Values far below 448, as no quantiser would choose them: to round these numbers once more would not give them back.
    scale = jnp.asarray(np.random.default_rng(4).uniform(0.01, 1, (2, 2)), jnp.float32)
    stored = Quantised(rounded(20 * weight, E4M3), scale, weight.shape)
    again = quantise(stored.astype(jnp.float32), recipe().weight).astype(jnp.float32)
    assert (np.abs(again / stored.astype(jnp.float32) - 1) > 1e-2).mean() > 0.1
    a, b = numpy_fp8.rounded(x, recipe().x), float64(stored.astype(jnp.float32))[0]
    for form in (stored, stored.packed(), replace(stored, values=stored.values.astype(jnp.float8_e4m3fn))):
        got = np.asarray(linear(x, form, recipe()), np.float64)
        assert (np.abs(got - a @ b) <= 158 * FLOAT32 * (np.abs(a) @ np.abs(b))).all()


def test_leading_axes_are_tokens():
    x, weight, dy = case(m=24)
    flat, batched = (run(x.reshape(*lead, 150), weight, dy.reshape(*lead, 141), recipe()) for lead in ((24,), (2, 3, 4)))
    assert batched[0].shape == (2, 3, 4, 141) and batched[1].shape == (2, 3, 4, 150)
    for got, expected in zip(batched, flat, strict=True):
        np.testing.assert_array_equal(got.reshape(expected.shape), expected)


@pytest.mark.parametrize("kept", [None, Quantiser(E5M6, (1, 128), True)], ids=["as_rounded", "e5m6"])
def test_no_tokens_give_no_rows_and_a_gradient_of_zeros(kept):
    x, weight, dy = case(m=0)
    y, dx, dw = run(x, weight, dy, recipe(), keep(x, kept) if kept else None)
    assert y.shape == (0, 141) and dx.shape == (0, 150)
    np.testing.assert_array_equal(dw, np.zeros(weight.shape))


def test_delayed_scales_are_each_operand_s_history_s_in_all_three_products():
    whole = Quantiser(tile=(WHOLE, WHOLE), floor=1e-30)
    how = Products(whole, whole, whole, whole, whole)
    x, weight, dy = case()
    amax = 1.75 * 2.0 ** np.array([3, 0, -2])  # scales are powers of two; W and dy saturate, x must not be scaled anew
    history = jnp.stack([jnp.zeros(3), jnp.asarray(amax, jnp.float32)], axis=1)
    y, pull_back = jax.vjp(lambda x, weight: linear(x, weight, how), x, Delayed(weight, history))
    dx, dw = pull_back(dy)
    pairs = zip(float64(x, weight, dy), amax, strict=True)
    x8, w8, dy8 = (numpy_fp8.cast(a * (448 / most), E4M3) * (most / 448) for a, most in pairs)
    for got, a, b in ((y, x8, w8), (dx, dy8, w8.T), (dw.weight, x8.T, dy8)):
        assert (np.abs(np.asarray(got, np.float64) - a @ b) <= (a.shape[1] + 8) * FLOAT32 * (np.abs(a) @ np.abs(b))).all()
