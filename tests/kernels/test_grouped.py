"""The grouped products: every implementation against a loop over rows in float64 NumPy, values and gradients."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core as jex_core
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsv3_jax.kernels.grouped import blocks_tpu, cost, outer_tpu, pallas_gpu
from dsv3_jax.kernels.grouped.api import grouped_product, grouped_swiglu
from dsv3_jax.kernels.grouped.work import make_work
from oracles.accelerators import HERE
from oracles.compiling import quick_jit
from oracles.unchecked import unchecked

IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu:interpret", "pallas_gpu:interpret", *HERE]
SMALL_TPU = blocks_tpu.Blocks(rows=64, inner=256, outer=256, height=32, columns=128, least=8, depth=128, turned=True)
SMALL_OUTER = blocks_tpu.OuterBlocks(rows=32, inner=128, outer=256, least=8)
SMALL_GPU = pallas_gpu.Blocks(rows=16, inner=16, outer=32, warps=4, stages=2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks along every side already of small operands."""
    products = dict.fromkeys([(side, long) for side in (False, True) for long in (False, True)], SMALL_TPU)
    monkeypatch.setattr(blocks_tpu, "TURN", 128)
    monkeypatch.setattr(blocks_tpu, "V5P", blocks_tpu.Chip(products, SMALL_TPU, SMALL_OUTER))
    monkeypatch.setattr(pallas_gpu, "PRODUCTS", dict.fromkeys(pallas_gpu.PRODUCTS, {7: SMALL_GPU}))
    monkeypatch.setattr(pallas_gpu, "OUTER", dict.fromkeys(pallas_gpu.OUTER, SMALL_GPU))


def group_of(count, rows):
    """Of every row; len(count) for rows of none."""
    owner = np.repeat(np.arange(len(count)), count)
    return np.concatenate([owner, np.full(rows - len(owner), len(count))])


def numpy_product(x, w, count):
    y = np.zeros((len(x), w.shape[2]))
    for r, e in enumerate(group_of(count, len(x))):
        if e < len(count):
            y[r] = x[r] @ w[e]
    return y


def numpy_outer(x, y, count):
    w = np.zeros((len(count), x.shape[1], y.shape[1]))
    for r, e in enumerate(group_of(count, len(x))):
        if e < len(count):
            w[e] += np.outer(x[r], y[r])
    return w


def numpy_swiglu(x, gates, gate, up, down, count, dy):
    """The result, and the gradients of <result, dy> with respect to all operands."""
    y, dx, dgates = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gates)
    dgate, dup, ddown = (np.zeros_like(w) for w in (gate, up, down))
    for r, e in enumerate(group_of(count, len(x))):
        if e == len(count):
            continue
        g, u = x[r] @ gate[e], x[r] @ up[e]
        s = 1 / (1 + np.exp(-g))
        h = g * s * u
        y[r] = gates[r] * h @ down[e]
        dh = down[e] @ dy[r]
        dgates[r] = dh @ h
        dg, du = gates[r] * dh * u * (s + g * s * (1 - s)), gates[r] * dh * g * s
        dx[r] = gate[e] @ dg + up[e] @ du
        dgate[e] += np.outer(x[r], dg)
        dup[e] += np.outer(x[r], du)
        ddown[e] += np.outer(gates[r] * h, dy[r])
    return y, dx, dgates, dgate, dup, ddown


def near(ours, theirs, magnitudes, dtype, terms, roundings=1):
    """Within float32 sums of `terms` numbers, whose magnitudes add up to these, and `roundings` to the dtype on the way."""
    unit = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-23
    ours = np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    allowed = magnitudes * (terms * 2.0**-24 + roundings * unit)
    worst = np.max(np.abs(ours - theirs) - allowed, initial=-1.0)
    assert worst <= 1e-30, worst


@st.composite
def problems(draw):
    counts = draw(st.lists(st.one_of(st.just(0), st.integers(0, 5), st.integers(30, 70)), min_size=1, max_size=5))
    rows = sum(counts) + draw(st.integers(0, 20))
    sides = draw(st.sampled_from([(1, 1), (3, 200), (160, 5), (128, 256), (136, 300), (300, 130)]))
    return counts, rows, sides, draw(st.integers(0, 2**16)), draw(st.sampled_from([1e-12, 1.0, 1e12]))


def numbers(rng, shape, dtype, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), dtype)


def poisoned(x, used):
    return x.at[used:].set(jnp.nan)


def here(function, *operands):
    return quick_jit(function)(*operands)


def with_gradients(function, operands, dy, call=here):
    """Result, then gradients of <result, dy>."""

    def both(operands, dy):
        y, pull_back = jax.vjp(function, *operands)
        return y, *pull_back(dy)

    return call(both, operands, dy)


def check_products(implementation, dtype, problem, call=here):
    counts, rows, (inner, outer), seed, scale = problem
    rng, used = np.random.default_rng(seed), sum(counts)
    x, w = numbers(rng, (rows, inner), dtype, scale), numbers(rng, (len(counts), inner, outer), dtype)
    dy, count = numbers(rng, (rows, outer), dtype), jnp.asarray(counts, jnp.int32)

    def run(x, w):
        return grouped_product(x, w, count, implementation=implementation)

    y, dx, dw = with_gradients(run, (poisoned(x, used), w), poisoned(dy, used), call)
    assert y.dtype == dx.dtype == dw.dtype == dtype

    def expected(x, w, dy):
        return numpy_product(x, w, counts), numpy_product(dy, w.swapaxes(1, 2), counts), numpy_outer(x, dy, counts)

    exact = [np.asarray(v, np.float64) for v in (x, w, dy)]
    values, magnitudes = expected(*exact), expected(*map(np.abs, exact))
    for found, value, magnitude, terms in zip((y, dx, dw), values, magnitudes, (inner, outer, rows), strict=True):
        near(found, value, magnitude, dtype, terms)


def check_experts(implementation, dtype, problem, call=here):
    counts, rows, (side, width), seed, _ = problem
    rng, used = np.random.default_rng(seed), sum(counts)
    shapes = (rows, side), *((len(counts), side, width),) * 2, (len(counts), width, side)
    x, gate, up, down = (numbers(rng, shape, dtype, shape[-2] ** -0.5 if len(shape) == 3 else 1) for shape in shapes)
    gates, dy = jnp.asarray(rng.uniform(size=rows), jnp.float32), numbers(rng, (rows, side), dtype)
    count = jnp.asarray(counts, jnp.int32)

    def run(x, gates, gate, up, down):
        return grouped_swiglu(x, gates, gate, up, down, count, implementation=implementation)

    found = with_gradients(run, (poisoned(x, used), poisoned(gates, used), gate, up, down), poisoned(dy, used), call)
    exact = [np.asarray(v, np.float64) for v in (x, gates, gate, up, down, dy)]
    values = numpy_swiglu(*exact[:5], counts, exact[5])
    magnitudes = numpy_swiglu(*map(np.abs, exact[:5]), counts, np.abs(exact[5]))
    # g, u and what follows from them are rounded on the way; SiLU's slope is at most 2.2 times that at |g|.
    for ours, theirs, magnitude in zip(found, values, magnitudes, strict=True):
        near(ours, theirs, 2.2 * magnitude, dtype, max(rows, side, width), roundings=6)


SOME = [20, 0, 70, 1], 100, (300, 256), 0, 1.0  # groups of several tiles; contractions of one block and of two


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_set_of_experts(implementation):
    check_experts(implementation, jnp.float32, SOME)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_of_one_channel(implementation):
    """Whose pre-activations are as narrow as the gates, one number a row."""
    check_experts(implementation, jnp.float32, ([3, 0, 2], 7, (1, 1), 0, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, deadline=None)
@given(problem=problems())
def test_products_and_their_gradients_are_those_of_a_loop_over_rows(implementation, dtype, problem):
    check_products(implementation, dtype, problem)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=5, deadline=None)
@given(problem=problems())
def test_experts_and_their_gradients_are_those_of_a_loop_over_rows(implementation, dtype, problem):
    check_experts(implementation, dtype, problem)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_small_integers_are_multiplied_exactly(implementation):
    rng, counts = np.random.default_rng(0), [3, 0, 40, 1]
    x, w = rng.integers(-4, 5, (50, 130)), rng.integers(-4, 5, (4, 130, 140))
    y = grouped_product(
        jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(counts, jnp.int32), implementation=implementation
    )
    np.testing.assert_array_equal(y, numpy_product(x.astype(float), w.astype(float), counts))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_row_nothing_is_computed(implementation):
    w, count = jnp.ones((2, 8, 16)), jnp.zeros(2, jnp.int32)
    y, pull_back = jax.vjp(lambda x, w: grouped_product(x, w, count, implementation=implementation), jnp.zeros((0, 8)), w)
    assert y.shape == (0, 16)
    np.testing.assert_array_equal(pull_back(y)[1], jnp.zeros_like(w))


def test_sums_over_rows_are_the_same_where_one_side_is_turned_first():
    """Whole tiles, and parts of them in which groups begin and end."""
    rng, counts = np.random.default_rng(0), [300, 0, 130]
    x, y = (rng.integers(-4, 5, (440, side)).astype(float) for side in (256, 128))
    blocks = blocks_tpu.OuterBlocks(rows=256, inner=128, outer=128, least=128, turned=True)
    assert blocks.turns
    operands = *(jnp.asarray(v, jnp.float32) for v in (x, y)), jnp.asarray(counts, jnp.int32)
    found = outer_tpu.outer_products(*operands, dtype=jnp.float32, name="outer", interpret=True, blocks=blocks)
    np.testing.assert_array_equal(found, numpy_outer(x, y, counts))


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
@pytest.mark.parametrize("counts", [[20, 0, 30, 13], [0, 0, 0, 1], [64, 0, 0, 0]])
def test_on_simulated_memory_without_a_race(counts):
    """NaN in everything that was not written, an error for reads outside; races are counted."""
    rng, count = np.random.default_rng(0), jnp.asarray(counts, jnp.int32)
    x, dy = numbers(rng, (64, 128), jnp.float32), numbers(rng, (64, 128), jnp.float32)
    gate, up, down = (numbers(rng, (4, 128, 128), jnp.float32, 0.1) for _ in range(3))
    gates = jnp.asarray(rng.uniform(size=64), jnp.float32)

    def run(implementation):
        def experts(*operands):
            return grouped_swiglu(*operands, count, implementation=implementation)

        y, pull_back = jax.vjp(experts, x, gates, gate, up, down)
        return y, *pull_back(dy)

    for ours, theirs in zip(run("pallas_tpu:simulate"), run("reference"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def of_chip(function, *operands):
    """`function` as a TPU of this kind would trace it, on this machine."""
    device = AbstractDevice("TPU7x", 1, "tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*operands)
    found = quick_jit(jex_core.jaxpr_as_fun(traced))(*jax.tree.leaves(operands))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def streamed(monkeypatch):
    """Small blocks for every chip, which the kernels copy themselves."""
    products = {key: SMALL_TPU._replace(streamed=True) for key in blocks_tpu.V5P.products}
    outer = SMALL_OUTER._replace(streamed=True)
    monkeypatch.setattr(blocks_tpu, "CHIPS", {"TPU7x": blocks_tpu.Chip(products, SMALL_TPU._replace(streamed=True), outer)})


def check_streamed(mode, counts, rows, side, width):
    rng, count = np.random.default_rng(0), jnp.asarray(counts, jnp.int32)
    used = sum(counts)
    x, dy = (poisoned(numbers(rng, (rows, side), jnp.float32), used) for _ in range(2))
    gate, up = (numbers(rng, (len(counts), side, width), jnp.float32, 0.1) for _ in range(2))
    down = numbers(rng, (len(counts), width, side), jnp.float32, 0.1)
    gates = poisoned(jnp.asarray(rng.uniform(size=rows), jnp.float32), used)

    def run(implementation, *operands):
        *operands, dy = operands
        y, pull_back = jax.vjp(lambda *v: grouped_swiglu(*v, count, implementation=implementation), *operands)
        return y, *pull_back(dy)

    operands = x, gates, gate, up, down, dy
    ours = of_chip(partial(run, f"pallas_tpu:{mode}"), *operands)
    for mine, theirs in zip(ours, run("reference", *operands), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_kernels_that_copy_their_own_blocks_compute_the_same(monkeypatch):
    streamed(monkeypatch)
    check_streamed("interpret", [70, 0, 33, 9], 128, 128, 256)  # whole blocks: a copy of fewer rows is no slice of known size


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "side", "width"),
    [([20, 0, 30, 13], 128, 128), ([0, 0, 0, 1], 128, 128), ([64, 0, 0, 0], 128, 128), ([20, 0, 30, 13], 256, 384)],
)
def test_kernels_that_copy_their_own_blocks_do_so_without_a_race(monkeypatch, counts, side, width):
    streamed(monkeypatch)
    check_streamed("simulate", counts, 80, side, width)  # several blocks of columns, if wider than one


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
@pytest.mark.parametrize("check", [check_products, check_experts])
@pytest.mark.parametrize("sides", [(128, 128), (256, 384)])
def test_kernels_that_copy_their_own_blocks_do_so_in_bfloat16(monkeypatch, check, sides):
    """Tiles of which have twice the rows; sums are float32, and only what is returned is rounded."""
    streamed(monkeypatch)
    check("pallas_tpu:simulate", jnp.bfloat16, ([20, 0, 30, 13], 80, sides, 0, 1.0), of_chip)


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    tile=st.integers(1, 7),
    empty=st.booleans(),
    more=st.integers(0, 9),
)
def test_the_list_of_work_has_each_tile_of_each_group_once_and_in_order(counts, tile, empty, more):
    rows = max(1, sum(counts) + more)
    make = quick_jit(partial(make_work, rows=rows, tile=tile, empty=empty))
    work = jax.tree.map(np.asarray, make(jnp.asarray(counts, jnp.int32)))
    expected = []
    for e, n in enumerate(counts):
        first = sum(counts[:e])
        tiles = (
            range(first // tile, (first + n - 1) // tile + 1) if n else [min(first // tile, -(-rows // tile) - 1)][: int(empty)]
        )
        expected += [(e, t) for t in tiles]
    assert list(zip(work.group_S[: work.size], work.tile_S[: work.size], strict=True)) == expected
    assert (work.group_S[work.size :] == len(counts)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cublas"}, "implementation: expected one of reference, xla, pallas_tpu, pallas_gpu"),
        ({"implementation": "xla:interpret"}, "implementation: expected one of"),
        ({"implementation": "pallas_gpu:simulate"}, "implementation: expected one of"),
        ({"w_EIO": jnp.ones((2, 8, 16), jnp.bfloat16)}, "w_EIO: expected x's dtype"),
        ({"w_EIO": jnp.ones((3, 8, 16))}, "w_EIO: expected as many matrices as groups, 2, got 3"),
        ({"w_EIO": jnp.ones((2, 9, 16))}, r"w_EIO: expected \[2, 8, O\]"),
    ],
)
def test_wrong_operands_are_one_line(change, message):
    operands = {"x_RI": jnp.ones((4, 8)), "w_EIO": jnp.ones((2, 8, 16)), "count_E": jnp.array([1, 2]), "implementation": "xla"}
    with pytest.raises(ValueError, match=message) as error:
        unchecked(lambda: grouped_product(**(operands | change)))
    assert "\n" not in str(error.value)


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(0, 90), min_size=1, max_size=5), more=st.integers(0, 40), weights=st.sampled_from([1, 2]),
    transposed=st.booleans(),     sides=st.sampled_from([(128, 256), (256, 128), (200, 300), (384, 512)]),
)  # fmt: skip
def test_the_grid_s_cost_is_that_of_walking_its_list(counts, more, weights, transposed, sides):
    """Steps, iterations and bytes, by walking the list of work as the pipeline does: a block is fetched when it changes."""
    (inner, outer), rows = sides, max(1, sum(counts) + more)
    b = blocks_tpu.fit_products(SMALL_TPU, rows, inner, outer)
    used = sum(counts)
    make = quick_jit(partial(make_work, rows=rows, tile=b.rows))
    work = jax.tree.map(np.asarray, make(jnp.asarray([*counts, rows - used], jnp.int32)))
    n_outer, n_inner = -(-outer // b.outer), -(-inner // b.inner)
    moved = zeroed = steps = turned = 0
    iterations = Counter()
    x_before = w_before = y_before = None
    for j in range(n_outer):
        for s in range(int(work.size)):
            group, tile = int(work.group_S[s]), int(work.tile_S[s])
            first = max(int(work.first_G[group]) - tile * b.rows, 0)
            end = min(int(work.end_G[group]) - tile * b.rows, b.rows)
            across = b.outer // b.columns
            for k in range(n_inner):
                steps += 1
                x_at, w_at = (tile, k), (min(group, len(counts) - 1), k, j)
                width = min(b.inner, inner - k * b.inner)
                fresh = n_inner > 1 or s == 0 or group != work.group_S[s - 1]
                turned += b.turns * (group < len(counts) and fresh)
                moved += b.rows * width * (x_at != x_before) + weights * width * b.outer * (w_at != w_before)
                x_before, w_before = x_at, w_at
                if group == len(counts):
                    zeroed += (-(-end // b.height) - first // b.height) * across
                    continue
                heights = (b.height, *b.pieces)
                at = first - first % heights[-1]
                while at < end:  # the highest part that has no row behind the group's last piece
                    height = next(height for height in heights if at + height < end + heights[-1])
                    iterations[height] += across
                    at += height
            moved += 3 * b.rows * b.outer * ((tile, j) != y_before)
            y_before = tile, j
    found = cost.of_products(
        counts, rows, inner, outer, SMALL_TPU, weights=weights, wide_extras=1, outs=2, transposed=transposed
    )
    assert found.steps == steps
    if transposed and b.turns:
        assert found.trips[0] * steps == pytest.approx(turned)
        found = found._replace(trips=found.trips[1:])
    assert [n * steps for n in found.trips[: 1 + len(b.pieces)]] == pytest.approx(
        [iterations[height] for height in (b.height, *b.pieces)]
    )
    assert found.trips[-1] * steps == pytest.approx(zeroed)
    rows_multiplied = sum(height * n for height, n in iterations.items())
    assert found.flops == 2 * rows_multiplied * b.columns * inner // n_inner * weights
    # Where one column of blocks ends and the next begins, x's block may be the same.
    assert 0 <= found.bytes - moved * 2 <= 2 * (n_outer - 1) * b.rows * inner
    assert found.least_flops == 2 * used * inner * outer * weights


@settings(max_examples=12, deadline=None)
@given(counts=st.lists(st.integers(0, 90), min_size=1, max_size=5), more=st.integers(0, 40))
def test_the_outer_grid_s_cost_is_that_of_walking_its_list(counts, more):
    """Whole tiles, masked parts of others, groups stored and groups without a row."""
    inner, outer, rows = 200, 300, max(1, sum(counts) + more)
    b = blocks_tpu.fit_outer(SMALL_OUTER, rows, inner, outer)
    make = quick_jit(partial(make_work, rows=rows, tile=b.rows, empty=True))
    work = jax.tree.map(np.asarray, make(jnp.asarray(counts, jnp.int32)))
    sizes, runs = b.pieces, Counter()
    for group, tile in zip(work.group_S[: work.size], work.tile_S[: work.size], strict=True):
        first, end = max(work.first_G[group] - tile * b.rows, 0), min(work.end_G[group] - tile * b.rows, b.rows)
        runs["whole"] += end - first == b.rows
        at = first - first % sizes[-1] if 0 < end - first < b.rows else end
        while at < end:
            size = next(size for size in sizes if at + size < end + sizes[-1])
            runs[size] += 1
            at += size
    found, steps = cost.of_outer(counts, rows, inner, outer, SMALL_OUTER), int(work.size)
    full = sum(n > 0 for n in counts)
    expected = [runs["whole"], *(runs[size] for size in sizes), full, len(counts) - full]
    assert [n * steps for n in found.trips] == pytest.approx(expected)
    columns = -(-inner // b.inner) * -(-outer // b.outer)
    assert found.steps == columns * steps
    multiplied = b.rows * runs["whole"] + sum(size * runs[size] for size in sizes)
    assert found.flops == 2 * columns * multiplied * b.inner * b.outer
