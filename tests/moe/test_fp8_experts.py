"""The routed experts in FP8 against NumPy in float64, one expert's rows at a time, which rounds what the recipe rounds."""

from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dsv3_jax.config import Fp8Recipe
from dsv3_jax.fp8.delayed import Delayed
from dsv3_jax.fp8.formats import E4M3, rounded
from dsv3_jax.fp8.precision import products, swiglu_cache
from dsv3_jax.fp8.quantize import Quantised, quantise
from dsv3_jax.moe.dispatch import make_plan
from dsv3_jax.moe.fp8_experts import How, _grouped, _outer, _rows, chosen_fp8_implementation, fp8_routed_experts
from dsv3_jax.presets import preset
from oracles import numpy_fp8
from oracles.compiling import quick_jit

IMPLEMENTATIONS = ["bucketed", "ragged_dot"]
NAMES = ["y", "dx", "dgates", "dgate_proj", "dup_proj", "ddown_proj"]
TINY = preset("tiny").model


def configured(**recipe):
    return replace(TINY, fp8=Fp8Recipe(**recipe))


def in_tiles(parts, how):
    """Each expert's rows rounded in tiles of its own, or all experts' in one."""
    side = how.tile[0] or 1
    padded = [np.pad(part, ((0, -len(part) % side), (0, 0))) for part in parts]
    rounded = numpy_fp8.rounded(np.concatenate(padded), how)
    ends = np.cumsum([len(part) for part in padded])
    return [rounded[end - len(pad) : end][: len(part)] for part, pad, end in zip(parts, padded, ends, strict=True)]


def multiply(a, b, accumulation):
    if accumulation.fidelity == "float32":
        return a @ b
    total, step = np.zeros((len(a), b.shape[1])), accumulation.interval if accumulation.fidelity == "promoted" else len(b)
    for i in range(0, len(b), step or 1):
        total += numpy_fp8.tensor_core(a[:, i : i + step], b[i : i + step], np.zeros(total.shape), accumulation.reading)
    return total


def oracle(x, indices, gates, experts, dy, config):
    """y and the gradients of <y, dy>."""
    up, down, cache = products(config, "experts.up_proj"), products(config, "experts.down_proj"), swiglu_cache(config)
    x, gates, dy, experts = jax.tree.map(lambda a: np.asarray(a.astype(jnp.float32), np.float64), (x, gates, dy, experts))
    w_gate, w_up, w_down = (numpy_fp8.rounded(w, how.weight) for w, how in zip(experts, (up, up, down), strict=True))
    times, outer = partial(multiply, accumulation=up.accumulation), partial(multiply, accumulation=down.accumulation)
    x, dy = numpy_fp8.rounded(x, up.x), numpy_fp8.rounded(dy, down.gradient)

    pairs = [np.argwhere(np.asarray(indices) == e) for e in range(len(w_gate))]  # (token, choice) of each expert's rows
    tokens, own_gates = [n for n, _ in (p.T for p in pairs)], [gates[*p.T][:, None] for p in pairs]
    xs, dys = [x[n] for n in tokens], [dy[n] for n in tokens]
    gs, us = ([times(rows, matrix) for rows, matrix in zip(xs, w, strict=True)] for w in (w_gate, w_up))

    def silu(g):
        return g / (1 + np.exp(-g))

    a = in_tiles([silu(g) * u * gate for g, u, gate in zip(gs, us, own_gates, strict=True)], down.x)
    ys = [times(rows, matrix) for rows, matrix in zip(a, w_down, strict=True)]
    if cache:
        gs, us = in_tiles(gs, cache), in_tiles(us, cache)
    hs = [silu(g) * u for g, u in zip(gs, us, strict=True)]
    das = [times(rows, matrix.T) for rows, matrix in zip(dys, w_down, strict=True)]
    dus = [da * gate * silu(g) for da, gate, g in zip(das, own_gates, gs, strict=True)]
    sigmoids = [1 / (1 + np.exp(-g)) for g in gs]
    dgs = [da * gate * u * s * (1 + g * (1 - s)) for da, gate, u, g, s in zip(das, own_gates, us, gs, sigmoids, strict=True)]
    dxs = [
        times(dg, v.T) + times(du, w.T)
        for dg, du, v, w in zip(in_tiles(dgs, up.gradient), in_tiles(dus, up.gradient), w_gate, w_up, strict=True)
    ]

    def weight_gradient(left, left_how, right, right_how):
        return np.stack([outer(p.T, q) for p, q in zip(in_tiles(left, left_how), in_tiles(right, right_how), strict=True)])

    weighted = [h * gate for h, gate in zip(hs, own_gates, strict=True)]
    y, dx, dgates = np.zeros(x.shape), np.zeros(x.shape), np.zeros(gates.shape)
    for e, chosen in enumerate(pairs):
        for row, (n, k) in enumerate(chosen):
            y[n] += ys[e][row]
            dx[n] += dxs[e][row]
            dgates[n, k] = das[e][row] @ hs[e][row]
    return [
        y, dx, dgates,
        weight_gradient(xs, up.x_wgrad, dgs, up.gradient_wgrad),
        weight_gradient(xs, up.x_wgrad, dus, up.gradient_wgrad),
        weight_gradient(weighted, down.x_wgrad, dys, down.gradient_wgrad),
    ]  # fmt: skip


def inputs(indices, n_experts, hidden=40, width=24, dtype=jnp.float32, seed=0):
    """x, indices, gates, (gate, up, down), dy: everything of order one, so that no gradient is negligible."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    indices = jnp.asarray(indices, jnp.int32)
    gates = jnp.asarray(rng.uniform(0.1, 1.0, size=indices.shape), jnp.float32)
    ups = [normal(n_experts, hidden, width, scale=hidden**-0.5) for _ in range(2)]
    experts = (*ups, normal(n_experts, width, hidden, scale=width**-0.5))
    # Tokens of different size from one 16 to the next, so that it matters whose scale is taken; powers of two are exact.
    size = jnp.asarray(4.0 ** -(np.arange(len(indices)) // 16 % 3), dtype)[:, None]
    x, dy = (normal(len(indices), hidden) * size for _ in range(2))
    return x, indices, gates, experts, dy


def random_choices(n_tokens, k, n_experts, seed=0):
    return np.argsort(np.random.default_rng(seed).normal(size=(n_tokens, n_experts)), axis=1)[:, :k]


def loads(*counts):
    """Indices [N, 1] with these loads, in shuffled order."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))[:, None]


def apply(x, indices, gates, experts, config, implementation):
    names = ("gate_proj", "up_proj", "down_proj")
    mapping = dict(zip(names, experts, strict=True))
    return fp8_routed_experts(x, indices, gates, mapping, config=config, implementation=implementation)


def both_passes(x, indices, gates, experts, dy, config, implementation):
    y, transpose = jax.vjp(lambda *inputs: apply(inputs[0], indices, *inputs[1:], config, implementation), x, gates, experts)
    dx, dgates, dexperts = transpose(dy)
    return [y, dx, dgates, *dexperts]


value_and_gradients = quick_jit(both_passes, static_argnames=("config", "implementation"))


# Where both round alike, what is left is float32's rounding, some 1e-6. Rarely that moves a value across the middle between
# two of the format's: one of hundreds is then 2^-4 off. To leave out one rounding is to move all of them: an error of 2e-2.
SAME_ROUNDING = 3e-3


def check(got, expected, tolerance=SAME_ROUNDING):
    for name, a, b in zip(NAMES, got, expected, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / (np.linalg.norm(b) + 1e-30)
        assert error < tolerance, f"{name}: {error}"


RECIPES = {
    "report": configured(),
    "tile_32": configured(tile=32),
    "blocks": configured(tile=16, gradient_scaling="block"),
    "tensor": configured(scaling="tensor"),
    "powers_of_two": configured(tile=32, power_of_two="everywhere"),
    "no_powers_of_two": configured(tile=32, power_of_two="nowhere"),
    "e5m2_gradients_wide_cache": configured(gradient_format="e5m2", swiglu_cache="compute"),
}
# With powers of two it is the same to cut a value's product as to cut the number's.
TENSOR_CORE = {
    f"{fidelity}_{accumulator}": configured(accumulation=fidelity, accumulator=accumulator, power_of_two="everywhere")
    for fidelity, accumulator in (("promoted", "aligned"), ("tensor_core", "aligned"), ("tensor_core", "apart"))
} | {
    # A block of rows must hold whole intervals, though a tile is shorter; one scale a tensor follows when all is added up.
    "promoted_short_tiles": configured(accumulation="promoted", tile=32, power_of_two="everywhere"),
    "tensor_core_whole": configured(accumulation="tensor_core", scaling="tensor", power_of_two="everywhere"),
}


@pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
def test_values_and_gradients_match_float64_in_every_recipe_and_both_implementations(config):
    # Choices of 5 stand for none; expert 4 is chosen by nobody.
    case = inputs(np.where(random_choices(70, 3, 5) == 4, 5, random_choices(70, 3, 5)), 5)
    expected = oracle(*case, config)
    for implementation in IMPLEMENTATIONS:
        check(value_and_gradients(*case, config=config, implementation=implementation), expected)


@pytest.mark.parametrize(
    ("recipe", "implementation"),
    [
        ("report", "pallas_tpu:interpret"),
        *(pytest.param(recipe, f"pallas_{chip}:interpret", marks=pytest.mark.slow)
          for recipe, chip in (("report", "gpu"), ("e5m2_gradients_wide_cache", "tpu"), ("e5m2_gradients_wide_cache", "gpu"))),
    ],
)  # fmt: skip
def test_kernels_match_float64(recipe, implementation):
    """An expert with more rows than a tile has, one with none, and choices of none."""
    config, case = RECIPES[recipe], inputs(np.concatenate([loads(150, 7, 0, 20), np.full((9, 1), 4)]), 4, hidden=140)
    check(value_and_gradients(*case, config=config, implementation=implementation), oracle(*case, config))


def test_kernels_are_the_default_on_tpu_where_they_have_the_recipe():
    for recipe, expected in (
        ({}, "pallas_tpu"),
        ({"scaling": "tensor"}, "ragged_dot"),
        ({"accumulation": "promoted"}, "bucketed"),
    ):
        assert chosen_fp8_implementation("auto", "tpu", Fp8Recipe(**recipe)) == expected
    with pytest.raises(ValueError, match="experts_implementation: kernels have FP8 with tile=128"):
        replace(configured(tile=32), experts_implementation="pallas_tpu")


@pytest.mark.parametrize("config", TENSOR_CORE.values(), ids=TENSOR_CORE)
def test_the_tensor_core_s_accumulation_is_that_of_each_expert_s_own_rows(config):
    case = inputs(loads(3, 0, 150), 3, hidden=12, width=8)  # 150 rows: more than a block, and more than an interval
    got = value_and_gradients(*case, config=config, implementation="bucketed")
    # Cut to 14 bits, sums are equal bit for bit but for SwiGLU's rounding; to promote an accumulator that carries costs 1e-4.
    check(got, oracle(*case, config), 2e-6)
    exactly = value_and_gradients(*case, config=replace(config, fp8=replace(config.fp8, accumulation="float32")),
                                  implementation="bucketed")  # fmt: skip
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(got, exactly, strict=True))


@st.composite
def cases(draw):
    n_experts = draw(st.integers(1, 5))
    n_tokens, k = draw(st.sampled_from([1, 7, 40])), draw(st.integers(1, n_experts))
    indices = random_choices(n_tokens, k, n_experts, seed=draw(st.integers(0, 99)))
    nobody, idle = draw(st.booleans()), draw(st.integers(0, 1))
    indices = np.where(nobody & (indices == 0), n_experts + idle, indices)
    return inputs(indices, n_experts + idle, hidden=draw(st.sampled_from([1, 35])), width=draw(st.sampled_from([1, 17])))


@settings(max_examples=4)
@given(case=cases(), config=st.sampled_from([configured(tile=16), RECIPES["blocks"], RECIPES["tensor"]]))
def test_values_and_gradients_match_float64_for_any_shape(case, config):
    expected = oracle(*case, config)
    for implementation in IMPLEMENTATIONS:
        check(value_and_gradients(*case, config=config, implementation=implementation), expected)


@pytest.mark.parametrize(
    "indices",
    [loads(0, 200, 0, 0), loads(128, 127, 0, 129), loads(1, 0, 150, 1), np.full((20, 2), 4), np.tile([[3, 4]], (30, 1))],
    ids=["all_on_one_expert", "around_a_block", "very_uneven", "nobody_on_any", "half_on_none"],
)
def test_values_and_gradients_match_float64_for_any_load(indices):
    case, config = inputs(indices, 4), RECIPES["report"]
    expected = oracle(*case, config)
    for implementation in IMPLEMENTATIONS:
        check(value_and_gradients(*case, config=config, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes_are_those_of_the_inputs_and_weight_gradients_are_not_rounded(implementation):
    x, indices, gates, experts, dy = inputs(random_choices(30, 2, 4), 4)
    case = x.astype(jnp.bfloat16), indices, gates, experts, dy.astype(jnp.bfloat16)
    got = value_and_gradients(*case, config=RECIPES["tile_32"], implementation=implementation)
    y, dx, dgates, *dexperts = got
    assert y.dtype == dx.dtype == jnp.bfloat16 and {a.dtype for a in (dgates, *dexperts)} == {jnp.dtype(jnp.float32)}
    for d in dexperts:
        assert (np.asarray(d) != np.asarray(d.astype(jnp.bfloat16).astype(jnp.float32))).mean() > 0.9
    check(got, oracle(*case, RECIPES["tile_32"]), SAME_ROUNDING + 2**-9)  # half a bfloat16 unit in the results


# Of token 0, routed to experts 2 and 3; or of what is routed to no expert at all.
@pytest.mark.parametrize("first", [[2, 3], [6, 2], [6, 6]], ids=["two_experts", "one_expert", "none"])
@pytest.mark.parametrize("name", ["tile_32", "report"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_s_nan_reaches_only_its_own_row_and_its_own_experts(implementation, name, first):
    indices = np.array([first] + [[0, 1]] * 5 + [[1, 4]] * 3 + [[4, 0]] * 2 + [[2, 5]])
    clean = inputs(indices, 6, hidden=12, width=8)
    x, _, gates, experts, dy = clean
    poisoned = (x.at[0].set(np.nan), clean[1], gates.at[0].set(np.nan), experts, dy.at[0].set(np.nan))
    others = np.setdiff1d(np.arange(6), first)
    untouched = [slice(1, None)] * 3 + [others] * 3
    results = [value_and_gradients(*case, config=RECIPES[name], implementation=implementation) for case in (poisoned, clean)]
    for what, kept, got, expected in zip(NAMES, untouched, *results, strict=True):
        assert np.isfinite(np.asarray(expected)).all()
        np.testing.assert_array_equal(got[kept], expected[kept], err_msg=what)
    reached = [e for e in first if e < 6]
    assert all(np.isnan(np.asarray(d)[reached]).any(axis=(1, 2)).all() for d in results[0][3:])
    if not reached:
        np.testing.assert_array_equal(np.asarray(results[0][0])[0], np.zeros(12))


def test_repeated_calls_give_equal_bits_and_new_indices_compile_nothing_new():
    compiled = quick_jit(both_passes, static_argnames=("config", "implementation"))
    how = {"config": RECIPES["report"], "implementation": "bucketed"}
    x, indices, gates, experts, dy = inputs(random_choices(40, 2, 4), 4)
    first, second = (compiled(x, indices, gates, experts, dy, **how) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    compiled(x, jnp.asarray(np.tile([[0, 1]], (40, 1)), jnp.int32), gates, experts, dy, **how)
    assert compiled._cache_size() == 1


def test_quantised_experts_are_multiplied_as_they_are():
    x, indices, gates, experts, _ = inputs(random_choices(20, 2, 4), 4)
    # Values far below 448, as no quantiser would choose them: to round these numbers once more would not give them back.
    stored = []
    for w in experts:
        scale = np.random.default_rng(3).uniform(0.03, 0.1, [4, *(-(-side // 16) for side in w.shape[1:])])
        stored.append(Quantised(rounded(20 * w, E4M3), jnp.asarray(scale, jnp.float32), w.shape[1:], (16, 16)))
    plain = [np.asarray(w.astype(jnp.float32), np.float64) for w in stored]
    config = RECIPES["tile_32"]
    up, down = products(config, "experts.up_proj"), products(config, "experts.down_proj")
    expected, rows = np.zeros(x.shape), numpy_fp8.rounded(x, up.x)
    for n, k in np.ndindex(*indices.shape):
        e = int(indices[n, k])
        g, u = rows[n : n + 1] @ plain[0][e], rows[n : n + 1] @ plain[1][e]
        a = numpy_fp8.rounded(g / (1 + np.exp(-g)) * u * float(gates[n, k]), down.x)
        expected[n] += (a @ plain[2][e])[0]
    packed = [w.packed() for w in stored]
    for implementation in IMPLEMENTATIONS:
        for weights in (stored, packed):
            got = np.asarray(quick_jit(apply, static_argnums=(4, 5))(x, indices, gates, weights, config, implementation))
            assert np.linalg.norm(got - expected) < SAME_ROUNDING * np.linalg.norm(expected)


def test_between_the_passes_tokens_and_swiglu_s_inputs_take_one_byte_a_value():
    x, indices, gates, experts, _ = inputs(random_choices(30, 2, 4), 4, dtype=jnp.bfloat16)

    def pull_back(x, gates, experts):
        return jax.vjp(
            lambda *inputs: apply(inputs[0], indices, *inputs[1:], RECIPES["tile_32"], "bucketed"), x, gates, experts
        )[1]

    leaves = jax.tree.leaves(jax.eval_shape(pull_back, x, gates, experts))
    sizes = {w.shape for w in experts}
    large = [leaf for leaf in leaves if leaf.ndim == 2 and leaf.shape not in sizes and leaf.shape[-1] in (40, 24)]
    assert len(large) == 3 and {leaf.dtype for leaf in large} == {jnp.dtype(jnp.uint8)}


def test_an_implementation_without_fp8_is_refused():
    x, indices, gates, experts, _ = inputs(random_choices(3, 1, 2), 2)
    with pytest.raises(ValueError, match="FP8 has bucketed, ragged_dot, pallas_tpu, .*, got 'dense'"):
        apply(x, indices, gates, experts, RECIPES["report"], "dense")
    with pytest.raises(ValueError, match="ragged_dot accumulates in float32"):
        apply(x, indices, gates, experts, TENSOR_CORE["promoted_aligned"], "ragged_dot")


@pytest.mark.parametrize(("width", "hidden"), [(4096 // 16, 7168 // 16), (7168 // 16, 2048 // 16)])
def test_grouped_products_are_as_near_to_the_exact_ones_as_deepgemm_asks(width, hidden):
    """1 - 2<x, y> / (<x, x> + <y, y>) < 1e-3, each operand rounded once; V3's two shapes of an expert, a sixteenth of them."""
    config, rng = configured(), np.random.default_rng(4)
    up = products(config, "experts.up_proj")
    how = How(up, up, None, "bucketed")
    plan = make_plan(jnp.asarray(rng.integers(0, 5, (300, 1)), jnp.int32), 5)
    rows = _rows(plan, how.block)
    x, dy = (rng.normal(size=(len(rows.source_X), size)).astype(np.float32) for size in (hidden, width))
    x, dy = (np.where(np.asarray(rows.source_X)[:, None] < 300, v, 0) for v in (x, dy))
    weights = rng.normal(size=(5, hidden, width)).astype(np.float32)
    expert_X = np.repeat(np.arange(5), np.asarray(rows.count_E))
    used = len(expert_X)
    forward = _grouped(quantise(jnp.asarray(x), up.x), quantise(jnp.asarray(weights), up.weight), of=up, rows=rows, how=how)
    operands = quantise(jnp.asarray(x), up.x_wgrad), quantise(jnp.asarray(dy), up.gradient_wgrad)
    outer = _outer(*operands, of=up, rows=rows, how=how)
    exact_forward = np.einsum("xi,xio->xo", x[:used].astype(np.float64), weights[expert_X].astype(np.float64))
    exact_outer = np.stack([x[:used][expert_X == e].T.astype(np.float64) @ dy[:used][expert_X == e] for e in range(5)])
    for ours, exact in ((forward[:used], exact_forward), (outer, exact_outer)):
        ours = np.asarray(ours, np.float64)
        assert 1 - 2 * (ours * exact).sum() / ((ours**2).sum() + (exact**2).sum()) < 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_delayed_scales_are_each_operand_s_history_s_and_each_says_what_it_met(implementation):
    """One expert, so that all rows are its own; scales are powers of two, and all operands but x outgrow them."""
    config = configured(scaling="delayed", amax_history=2, power_of_two="nowhere", swiglu_cache="compute")
    x, indices, gates, experts, dy = inputs(np.zeros((30, 1)), 1, hidden=12, width=8)
    amax = np.array([[16.0, 0.25, 0.0625], [8.0, 0.125, 0.03125], [0.125, 0.5, 0.5]]) * 1.75  # gate, up, down: x, W, dy
    histories = [jnp.stack([jnp.zeros(3), jnp.asarray(row, jnp.float32)], axis=1) for row in amax]

    def both(x, gates, experts, histories, dy):
        def run(x, gates, experts, histories):
            return apply(x, indices, gates, tuple(map(Delayed, experts, histories)), config, implementation)

        y, pull_back = jax.vjp(run, x, gates, experts, histories)
        dx, dgates, dexperts, now = pull_back(dy)
        return [y, dx, dgates, *dexperts], now

    got, now = quick_jit(both)(x, gates, experts, histories, dy)

    def at(a, most):
        return numpy_fp8.cast(a * (448 / most), E4M3) * (most / 448)

    x, gates, dy = (np.asarray(a, np.float64) for a in (x, gates, dy))
    wide = [np.asarray(w[0], np.float64) for w in experts]
    (gate_x, _, gate_dy), (_, _, up_dy), (down_x, _, down_dy) = amax
    w_gate, w_up, w_down = map(at, wide, amax[:, 1])
    x8, dy8 = at(x, gate_x), at(dy, down_dy)
    g, u = x8 @ w_gate, x8 @ w_up
    s = 1 / (1 + np.exp(-g))
    h = g * s * u
    da = dy8 @ w_down.T
    dg, du = da * gates * u * s * (1 + g * (1 - s)), da * gates * g * s
    dg8, du8 = at(dg, gate_dy), at(du, up_dy)
    check(got, [
        at(h * gates, down_x) @ w_down, dg8 @ w_gate.T + du8 @ w_up.T, (da * h).sum(1, keepdims=True),
        (x8.T @ dg8)[None], (x8.T @ du8)[None], (at(h * gates, down_x).T @ dy8)[None],
    ])  # fmt: skip
    met = [(x, wide[0], dg), (x, wide[1], du), (h * gates, wide[2], dy)]
    for column, operands in zip(now, met, strict=True):
        np.testing.assert_array_equal(column[:, 1], np.zeros(3))
        np.testing.assert_allclose(column[:, 0], [np.abs(a).max() for a in operands], rtol=1e-4)
