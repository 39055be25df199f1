"""Attention over a cache of latents: every implementation against a loop over rows in float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsv3_jax.kernels.decode import pallas_gpu, pallas_tpu
from dsv3_jax.kernels.decode.api import decode_attention, paged_decode_attention
from dsv3_jax.kernels.decode.combine import combine
from dsv3_jax.kernels.decode.plan import Cost, Problem, least, performed
from dsv3_jax.kernels.decode.work import make_work
from oracles.accelerators import HERE
from oracles.unchecked import unchecked

IMPLEMENTATIONS = ["reference", "pallas_tpu:interpret", "pallas_gpu:interpret", *HERE]
SMALL_TPU = pallas_tpu.Blocks(rows=256, height=128, queries=4, columns=128, depth=3)
BFLOAT16, FLOAT32 = jnp.bfloat16, jnp.float32
SCALE = 0.37
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks along every side already of small operands."""
    monkeypatch.setattr(pallas_tpu, "BLOCKS", SMALL_TPU)
    monkeypatch.setattr(pallas_tpu, "PIECE", 32)
    monkeypatch.setattr(pallas_tpu, "TOGETHER", 2)
    small = (pallas_gpu.Blocks(queries=16, rows=16, warps=4, stages=2),)
    monkeypatch.setattr(pallas_gpu, "BLOCKS", {jnp.dtype(d): small for d in (BFLOAT16, FLOAT32)})


def numpy_attention(q, rows, length, latent):
    """Result, log-sum-exp, and what both may be off by in units of rounding: float64, a row after the other."""
    (batch, queries, heads, _), size = q.shape, rows.shape[1]
    out, lse = np.zeros((batch, queries, heads, latent)), np.full((batch, queries, heads), -np.inf)
    magnitude, largest = np.zeros_like(out), np.zeros_like(lse)
    for b, t, h in np.ndindex(batch, queries, heads):
        seen = min(max(length[b] - queries + t + 1, 0), size)
        if seen:
            keys = rows[b, :seen, : q.shape[3]]
            scores = keys @ q[b, t, h] * SCALE
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ keys[:, :latent] / weights.sum()
            magnitude[b, t, h] = weights @ np.abs(keys[:, :latent]) / weights.sum()
            lse[b, t, h] = scores.max() + np.log(weights.sum())
            largest[b, t, h] = (np.abs(keys) @ np.abs(q[b, t, h])).max() * SCALE
    return out, lse, magnitude, largest


def check_close(found, q, rows, length, latent, dtype):
    """Scores are sums of K float32 numbers, off by K ulps of their terms' magnitudes; a weight is off by as much, relatively.
    Then come sums over rows, some roundings of float32, and in bfloat16 those of the weights and the result."""
    out, lse, magnitude, largest = numpy_attention(*(np.asarray(v, np.float64) for v in (q, rows)), length, latent)
    score = largest * (q.shape[3] + 4) * 2.0**-24
    terms = (rows.shape[1] + 16) * 2.0**-24
    unit = 2.0**-8 if dtype == BFLOAT16 else 2.0**-23
    for ours, theirs, allowed in (
        (found[0], out, magnitude * (2 * score + terms + 2 * unit)[..., None]),
        (found[1], lse, score + terms + 4 * 2.0**-24 * np.abs(np.where(np.isfinite(lse), lse, 0.0))),
    ):
        ours = np.asarray(ours, np.float64)
        assert ours.shape == theirs.shape
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(ours[~finite], theirs[~finite])
        worst = np.max(np.abs(ours[finite] - theirs[finite]) - allowed[finite], initial=-1.0)
        assert worst <= 1e-30, worst
    assert found[0].dtype == dtype and found[1].dtype == FLOAT32


def operands(seed, lengths, queries, heads, sides, pages, page, extra, magnitude, dtype):
    """Rows of each sequence, and the same in pages of any order; NaN in all that no query sees."""
    rng, (latent, rope), batch = np.random.default_rng(seed), sides, len(lengths)
    size, width = page * pages, latent + rope
    q = jnp.asarray(magnitude * width**-0.5 * rng.normal(size=(batch, queries, heads, width)), dtype)
    rows = rng.normal(size=(batch, size, width + extra)) / magnitude
    rows[..., width:] = np.nan
    for b, length in enumerate(lengths):
        rows[b, max(length, 0) :] = np.nan
    table = rng.permutation(batch * pages + 2)[: batch * pages].reshape(batch, pages)
    cache = np.full((batch * pages + 2, page, width + extra), np.nan)
    cache[table] = rows.reshape(batch, pages, page, -1)
    for b, length in enumerate(lengths):
        table[b, max(0, -(-length // page)) :] = rng.choice([-1, 2**30, batch * pages + 1])  # undefined
    return (
        q,
        jnp.asarray(rows, dtype),
        jnp.asarray(cache, dtype),
        jnp.asarray(table, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
    )


def check(implementation, dtype, problem, splits, paged, rows_less=0):
    lengths, latent = problem["lengths"], problem["sides"][0]
    q, rows, cache, table, length = operands(**problem, dtype=dtype)
    how = {"latent": latent, "scale": SCALE, "splits": splits, "implementation": implementation}

    if not paged:  # a cache of any number of rows
        rows = rows[:, : rows.shape[1] - rows_less]

    @jax.jit
    def run(q, rows, cache, table, length):
        if paged:
            return paged_decode_attention(q, cache, table, length, **how)
        return decode_attention(q, rows, length, **how)

    check_close(run(q, rows, cache, table, length), q, rows, lengths, latent, dtype)


SOME = {
    "seed": 0,
    "lengths": [0, 1, 2, 257, 576, 600],  # of a whole block the first query does not see the last row; rows on another device
    "queries": 3,
    "heads": 2,
    "sides": (20, 12),
    "pages": 12,
    "page": 48,
    "extra": 3,
    "magnitude": 1.0,
}


@st.composite
def problems(draw):
    page, pages = draw(st.sampled_from([(16, 1), (16, 20), (48, 7), (64, 9), (544, 1), (272, 2)]))
    lengths = st.one_of(st.just(0), st.just(1), st.integers(-3, page * pages + 5))
    return {
        "seed": draw(st.integers(0, 2**16)),
        "lengths": draw(st.lists(lengths, min_size=1, max_size=4)),
        "queries": draw(st.integers(1, 3)),
        "heads": draw(st.sampled_from([1, 3, 8])),
        "sides": draw(st.sampled_from([(1, 0), (1, 1), (16, 8), (130, 7), (128, 64), (300, 20)])),
        "pages": pages,
        "page": page,
        "extra": draw(st.sampled_from([0, 5])),
        "magnitude": draw(st.sampled_from([1e-12, 1.0, 30.0, 1e12])),
    }


@pytest.mark.parametrize(("dtype", "splits"), [(FLOAT32, 1), (BFLOAT16, 3)], ids=["float32", "bfloat16, pages, splits"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_batch_of_sequences(implementation, dtype, splits):
    check(implementation, dtype, SOME, splits, paged=splits > 1, rows_less=5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(problem=problems(), splits=st.integers(1, 4), paged=st.booleans(), rows_less=st.integers(0, 15))
def test_results_are_those_of_a_loop_over_rows(implementation, dtype, problem, splits, paged, rows_less):
    check(implementation, dtype, problem, splits, paged, rows_less)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_largest_score_takes_all_however_large(implementation):
    """Scores of 1e30: margins between them exceed all rounding, and nothing overflows on the way."""
    rng, lengths = np.random.default_rng(0), [300, 17]
    rows = jnp.asarray(rng.permutation(600).reshape(2, 300, 1) + np.ones((1, 1, 16)), FLOAT32)
    q = jnp.asarray(np.array([1e28, -1e28]).reshape(1, 1, 2, 1) * np.ones((2, 1, 1, 16)), FLOAT32)
    how = {"latent": 8, "scale": 1.0, "splits": 2, "implementation": implementation}
    out, lse = jax.jit(partial(decode_attention, **how))(q, rows, jnp.asarray(lengths))
    for b, length in enumerate(lengths):
        own = np.asarray(rows[b, :length, 0])
        np.testing.assert_array_equal(out[b, 0, :, 0], [own.max(), own.min()])
        np.testing.assert_allclose(lse[b, 0], [16e28 * own.max(), -16e28 * own.min()], rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_sequence_a_token_or_a_row_nothing_is_computed(implementation):
    for batch, queries, size in ((0, 1, 16), (2, 0, 16), (2, 1, 0)):
        out, lse = decode_attention(
            jnp.ones((batch, queries, 2, 8)), jnp.ones((batch, size, 8)), jnp.ones(batch, jnp.int32),
            latent=4, scale=1.0, implementation=implementation,
        )  # fmt: skip
        assert out.shape == (batch, queries, 2, 4)
        np.testing.assert_array_equal(out, 0.0)
        np.testing.assert_array_equal(lse, -np.inf)


def test_devices_with_a_part_of_the_rows_each_give_the_result_of_all():
    """A query sees the rows up to its own position, wherever they are: four devices, lengths that end on each."""
    rng, lengths, per_device = np.random.default_rng(0), [0, 1, 17, 40, 63], 16
    q, rows = (jnp.asarray(rng.normal(size=shape), FLOAT32) for shape in ((5, 3, 2, 24), (5, 64, 24)))
    mesh = jax.make_mesh((4,), ("sequence",), devices=jax.devices()[:4])

    def one(q, rows, length):
        own = length - per_device * jax.lax.axis_index("sequence").astype(jnp.int32)
        out, lse = decode_attention(q, rows, own, latent=16, scale=SCALE, implementation="reference")
        return combine(out[None], lse[None], axis_name="sequence")

    spec = PartitionSpec(None, "sequence")
    run = jax.shard_map(one, mesh=mesh, in_specs=(PartitionSpec(), spec, PartitionSpec()), out_specs=PartitionSpec())
    own = jax.device_put(rows, NamedSharding(mesh, spec))
    check_close(jax.jit(run)(q, own, jnp.asarray(lengths)), q, rows, lengths, 16, FLOAT32)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_on_a_mesh_results_vary_as_queries_and_rows_do_and_interpreters_are_refused(implementation):
    mesh = jax.make_mesh((2, 2), ("sequence", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    q, rows, lengths = jnp.ones((2, 1, 8, 32), BFLOAT16), jnp.ones((2, 64, 32), BFLOAT16), jnp.ones(2, jnp.int32)

    def traced(how):
        def one(q, rows, lengths):
            found = decode_attention(q, rows, lengths, latent=16, scale=1.0, implementation=how)
            assert all(jax.typeof(x).manual_axis_type.varying == {"sequence", "tensor"} for x in found)
            return tuple(x[None] for x in found)

        specs = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "sequence"), PartitionSpec()
        run = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("sequence", None, None, "tensor"))
        return jax.eval_shape(run, q, rows, lengths)

    assert traced(implementation)[0].shape == (2, 2, 1, 8, 16)
    with pytest.raises(ValueError, match="implementation: expected one that is compiled on a mesh"):
        traced(implementation + ":interpret")


def test_parts_that_saw_nothing_add_nothing_whatever_they_hold():
    lse = jnp.array([[0.0, -jnp.inf, 1e30], [-jnp.inf, -jnp.inf, -1e30]]).reshape(2, 1, 1, 3)
    part = jnp.array([[2.0, jnp.nan, 5.0], [jnp.nan, jnp.nan, 7.0]]).reshape(2, 1, 1, 3, 1)
    out, total = combine(part, lse)
    np.testing.assert_array_equal(out.reshape(3), [2.0, 0.0, 5.0])
    np.testing.assert_array_equal(total.reshape(3), [0.0, -np.inf, np.float32(1e30)])


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
@pytest.mark.parametrize(("splits", "paged"), [(1, True), (2, False), (3, True)])
def test_on_simulated_memory_without_a_race(monkeypatch, splits, paged):
    """NaN in everything that was not written, an error for reads outside; races are counted. What is copied is as planned."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    copies, start = [], interpret_pallas_call.dma_start

    def counted(*arguments, **more):
        copies.append(None)
        return start(*arguments, **more)

    monkeypatch.setattr(interpret_pallas_call, "dma_start", counted)
    lengths = [0, 300, 1, 257, 0, 576]
    problem = SOME | {"lengths": lengths, "queries": 2, "extra": 0}
    q, rows, cache, table, length = operands(**problem, dtype=FLOAT32)
    how = {"latent": 20, "scale": SCALE, "splits": splits, "implementation": "pallas_tpu:simulate"}
    found = paged_decode_attention(q, cache, table, length, **how) if paged else decode_attention(q, rows, length, **how)
    check_close(found, q, rows, lengths, 20, FLOAT32)
    page, pages, piece = (48, 12, 16) if paged else (576, 1, 32)
    plan = performed(Problem(tuple(lengths), 2, 2, 32, 20, page, pages, 4, splits), SMALL_TPU)
    assert len(copies) * piece * 128 * 4 == plan.cache


@settings(max_examples=60, deadline=None)
@given(visible=st.lists(st.integers(0, 40), min_size=5, max_size=5), sides=st.sampled_from([(1, 3), (5, 1), (5, 3)]))
def test_the_list_of_work_has_each_block_of_each_part_once_and_in_order(visible, sides):
    (batch, splits), rows = sides, 3
    visible = visible[:batch]
    cores = min(len(visible) * splits, 2)
    listed = jax.jit(make_work, static_argnums=(1, 2, 3, 4))(jnp.asarray(visible), rows, splits, 40, cores)
    part_E, block_E, first_L = map(np.asarray, listed)
    expected = []
    for b, size in enumerate(visible):
        blocks = -(-size // rows)
        each = -(-blocks // splits)
        for x in range(splits):
            own = range(x * each, min((x + 1) * each, blocks))
            expected += [(b * splits + x, i) for i in own] or [(b * splits + x, min(x * each, blocks))]
    total = first_L[-1]
    assert list(zip(part_E[:total], block_E[:total], strict=True)) == expected
    # Each core has whole parts, at least one, and about half of the work.
    ends = [e for e in range(1, total) if part_E[e] != part_E[e - 1]]
    assert first_L[0] == 0 and set(first_L[1:-1]) <= set(ends)
    if cores == 2:
        assert abs(2 * first_L[1] - total) <= 2 * max(map(list(part_E[:total]).count, set(part_E[:total])))


def test_a_plan_counted_by_hand():
    """One sequence of 600 rows in pages of 48 and one of none: blocks of 256 rows, pieces of 16, two heads, one query."""
    problem = Problem((600, 0), queries=1, heads=2, width=96, latent=64, page=48, pages=20)
    row = 128 * 2
    rest = 2 * 2 * row + 2 * (2 * 128 * 2 + 128 * 4)
    assert performed(problem, SMALL_TPU) == Cost(608 * row, rest, 2 * 2 * (256 + 256 + 128) * 160)
    assert least(problem) == Cost(600 * 96 * 2, 2 * 2 * (160 * 2 + 4), 2 * 2 * 600 * 160)


@pytest.mark.parametrize(("batch", "size", "page"), [(32, 4096, None), (32, 32768, 128), (128, 4096, 64), (128, 32768, None)])
def test_at_v3s_shapes_at_most_a_quarter_more_than_the_least_bytes_are_moved(monkeypatch, batch, size, page):
    monkeypatch.setattr(pallas_tpu, "PIECE", 128)
    length = tuple(int(n) for n in np.random.default_rng(0).integers(1, size + 1, batch))
    page = page or size
    problem = Problem(length, queries=1, heads=128, width=576, latent=512, page=page, pages=size // page)
    blocks = pallas_tpu.Blocks(1024, 256, 256, 128)
    assert performed(problem, blocks).bytes <= 1.25 * least(problem).bytes


def attend(**change):
    how = {
        "q_BTHK": jnp.ones((2, 1, 3, 8)), "cache_PSW": jnp.ones((4, 16, 8)), "table_BM": jnp.zeros((2, 2), jnp.int32),
        "length_B": jnp.ones(2, jnp.int32), "latent": 4, "scale": 1.0, "implementation": "reference",
    }  # fmt: skip
    return paged_decode_attention(**(how | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cudnn"}, "implementation: expected one of reference, pallas_tpu, pallas_gpu"),
        ({"implementation": "pallas_gpu:simulate"}, "implementation: expected one of"),
        ({"cache_PSW": jnp.ones((4, 16, 8), BFLOAT16)}, "cache: expected q's dtype, float32 or bfloat16, got bfloat16"),
        ({"cache_PSW": jnp.ones((4, 16, 7))}, "cache: expected rows of at least 8 numbers, as q has, got 7"),
        ({"cache_PSW": jnp.ones((4, 10, 8)), "implementation": "pallas_tpu:interpret"}, "pages of a multiple of 16 rows"),
        ({"table_BM": jnp.zeros((3, 2), jnp.int32)}, "table_BM: expected 2 sequences, as q has, got 3"),
        ({"length_B": jnp.ones(3, jnp.int32)}, r"length_B: expected \[2\], a length a sequence, got \[3\]"),
        ({"latent": 9}, "latent: expected 1 to 8"),
        ({"splits": 0}, "splits: expected at least 1, got 0"),
    ],
)
def test_wrong_operands_are_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        unchecked(partial(attend, **change))
    assert "\n" not in str(error.value)


def test_a_cache_of_other_sequences_is_refused():
    with pytest.raises(ValueError, match="cache_BSW: expected 2 sequences, as q has, got 3"):
        unchecked(
            lambda: decode_attention(
                jnp.ones((2, 1, 3, 8)),
                jnp.ones((3, 16, 8)),
                jnp.ones(2, jnp.int32),
                latent=4,
                scale=1.0,
                implementation="reference",
            )
        )
