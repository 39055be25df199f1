"""Attention for MLA: every implementation against a loop over queries in float64 NumPy, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.kernels.attention import pallas_gpu, pallas_tpu, pallas_tpu_backward, reference
from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.kernels.attention.call import Operands
from oracles.accelerators import HERE
from oracles.unchecked import unchecked

IMPLEMENTATIONS = ["reference", "pallas_tpu:interpret", "pallas_gpu:interpret", *HERE]
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
pytestmark = pytest.mark.usefixtures("quick_compilation")
NAMES = "q", "q_rope", "k", "k_rope", "v"
# Scores [keys, queries], of two parts of a tile and columns of two widths; two pieces of queries in a block.
TURNED = pallas_tpu.Blocks(queries=768, keys=512, tile=256, height=384, chunk=16, columns=256, part=128)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks along every side, and several tiles in one, already of small operands."""
    monkeypatch.setattr(pallas_tpu, "BLOCKS", pallas_tpu.Blocks(queries=256, keys=256, tile=128, height=128, chunk=64))
    backward = pallas_tpu_backward.Blocks(block=256, tile=128, wide=256, chunk=64, span=512)
    monkeypatch.setattr(pallas_tpu_backward, "BLOCKS", backward)
    for name in ("FORWARD", "QUERIES", "KEYS"):
        monkeypatch.setattr(pallas_gpu, name, dict.fromkeys((2, 4), pallas_gpu.Blocks(64, 32, 4, 2)))


def collect(d, query, seen, ds, p, x, g):
    """Adds to the gradients what one query gives."""
    b, h, _ = query
    d["q"][query], d["q_rope"][query] = ds @ x["k"][b, h, seen], ds @ x["k_rope"][b, seen]
    d["k"][b, h, seen] += np.outer(ds, x["q"][query])
    d["k_rope"][b, seen] += np.outer(ds, x["q_rope"][query])
    d["v"][b, h, seen] += np.outer(p, g)


def numpy_attention(q, q_rope, k, k_rope, v, segments, scale, d_out):
    """Result and gradients, by name; of each the sum of its terms' magnitudes; the largest such sum of a score."""
    arrays = dict(zip(NAMES, (q, q_rope, k, k_rope, v), strict=True))
    out, out_size, d, size, largest = np.zeros_like(d_out), np.zeros_like(d_out), {}, {}, 0.0
    for name, x in arrays.items():
        d[name], size[name] = np.zeros_like(x), np.zeros_like(x)
    (B, H, T, _), S = q.shape, k.shape[2]
    for b, h, t in np.ndindex(B, H, T):
        at = S - T + t
        seen = np.arange(S) <= at
        if segments is not None:
            seen &= (segments[b] == segments[b, at]) & (segments[b] != 0)
        if not seen.any():
            continue
        keys, ropes, values, g = k[b, h, seen], k_rope[b, seen], v[b, h, seen], d_out[b, h, t]
        s = scale * (keys @ q[b, h, t] + ropes @ q_rope[b, h, t])
        largest = max(largest, abs(scale) * (abs(keys) @ abs(q[b, h, t]) + abs(ropes) @ abs(q_rope[b, h, t])).max())
        p = np.exp(s - s.max())
        p /= p.sum()
        out[b, h, t], out_size[b, h, t] = p @ values, p @ abs(values)
        ds = scale * p * (values @ g - out[b, h, t] @ g)
        ds_size = abs(scale) * p * (abs(values) @ abs(g) + out_size[b, h, t] @ abs(g))
        collect(d, (b, h, t), seen, ds, p, arrays, g)
        collect(size, (b, h, t), seen, ds_size, p, {name: abs(x) for name, x in arrays.items()}, abs(g))
    return {"out": out} | d, {"out": out_size} | size, largest


def check(implementation, dtype, problem):
    (B, H, T, S, C, R, W), segments, seed, sizes = problem
    rng, scale = np.random.default_rng(seed), (C + R) ** -0.5
    shapes = (B, H, T, C), (B, H, T, R), (B, H, S, C), (B, S, R), (B, H, S, W)
    q_size, v_size = sizes
    arrays = [
        jnp.asarray(size * rng.normal(size=shape), dtype)
        for size, shape in zip((q_size, q_size, 1, 1, v_size), shapes, strict=True)
    ]
    d_out = jnp.asarray(rng.normal(size=(B, H, T, W)), dtype)
    poisoned, d_out_poisoned = list(arrays), d_out
    if segments is not None:
        padding = jnp.asarray(segments) == 0

        def poison(x):
            rows = padding[:, S - x.shape[-2] :, None]
            return jnp.where(rows if x.ndim == 3 else rows[:, None], jnp.asarray(jnp.nan, dtype), x)

        poisoned, d_out_poisoned = [poison(x) for x in arrays], poison(d_out)

    def run(*arrays):
        ids = None if segments is None else jnp.asarray(segments, jnp.int32)
        return mla_attention(*arrays, ids, scale, implementation=implementation)

    out, pull_back = jax.vjp(run, *poisoned)
    found = dict(zip(("out", *NAMES), (out, *pull_back(d_out_poisoned)), strict=True))
    values, sizes, largest = numpy_attention(
        *(np.asarray(x, np.float64) for x in arrays), segments, scale, np.asarray(d_out, np.float64)
    )
    # A score's error e, from its float32 sum and from its change of base, makes a weight wrong by e and its normalisation by as
    # much. Weights, scores' gradients, the result, which the latter hold, and what is returned are rounded to the dtype.
    unit = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-23
    error = 4 * unit + (T + S + C + R + W) * 2.0**-24 + 4 * largest * (C + R + 8) * 2.0**-24
    for name, value in values.items():
        ours = np.asarray(found[name], np.float64)
        assert found[name].dtype == dtype and ours.shape == value.shape and np.isfinite(ours).all(), name
        # Weights below float32's smallest normal number are zeros.
        worst = np.max(np.abs(ours - value) - error * sizes[name], initial=-1.0)
        assert worst <= 1e-30, (name, worst)


@st.composite
def problems(draw):
    B, H = draw(st.sampled_from([(1, 1), (1, 2), (2, 3), (2, 2)]))
    S = draw(st.one_of(st.integers(1, 9), st.integers(120, 136), st.integers(250, 600)))
    T = draw(st.one_of(st.just(S), st.integers(1, S)))
    C, R, W = draw(st.sampled_from([(16, 8, 16), (8, 16, 24), (1, 1, 1), (128, 64, 128), (24, 8, 136)]))
    segments = None
    if draw(st.booleans()):
        cuts, ids = sorted(draw(st.lists(st.integers(0, S), max_size=5))), draw(st.permutations(range(6)))
        row = np.repeat(ids[: len(cuts) + 1], np.diff([0, *cuts, S]))
        segments = np.stack([row, *([np.zeros_like(row)] * (B - 1))])
    sizes = draw(st.sampled_from([(1e-3, 1.0), (1.0, 1.0), (30.0, 1.0), (1.0, 1e-12), (1.0, 1e12)]))
    return (B, H, T, S, C, R, W), segments, draw(st.integers(0, 2**16)), sizes


SOME = (1, 2, 260, 300, 16, 8, 24), np.repeat([[3, 1, 0, 1, 0]], [100, 60, 20, 90, 30], axis=1), 0, (1.0, 1.0)


@EACH
def test_some_documents_among_padding(implementation):
    check(implementation, jnp.float32, SOME)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_without_segments_a_query_sees_all_keys_up_to_its_position(implementation):
    check(implementation, jnp.bfloat16, ((1, 3, 270, 270, 16, 8, 16), None, 0, (1.0, 1.0)))


@pytest.mark.parametrize("segments", [None, np.repeat([[1, 0, 2]], [60, 20, 420], axis=1)], ids=["whole", "documents"])
@pytest.mark.parametrize(("queries", "keys"), [(500, 512), (500, 256), (244, 256)])  # one block of keys, two, and behind others
def test_what_a_square_tile_on_the_diagonal_leaves_out_nobody_sees(segments, queries, keys, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "BLOCKS", TURNED._replace(queries=512, height=256, columns=128, keys=keys))
    check("pallas_tpu:interpret", jnp.float32, ((1, 1, queries, 500, 16, 8, 16), segments, 0, (1.0, 1.0)))


@DTYPES
def test_with_scores_turned_on_their_side(dtype, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "BLOCKS", TURNED)
    problem = SOME if dtype == jnp.float32 else ((1, 1, 500, 700, 16, 8, 16), None, 0, (1.0, 1.0))
    check("pallas_tpu:interpret", dtype, problem)


@pytest.mark.slow
@DTYPES
@settings(max_examples=6, deadline=None)
@given(problem=problems())
def test_turned_values_are_those_of_a_loop_over_queries(dtype, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "BLOCKS", TURNED)
        check("pallas_tpu:interpret", dtype, problem)


@pytest.mark.slow
@DTYPES
@EACH
@settings(max_examples=6, deadline=None)
@given(problem=problems())
def test_values_and_gradients_are_those_of_a_loop_over_queries(implementation, dtype, problem):
    check(implementation, dtype, problem)


@pytest.mark.slow
def test_more_queries_than_a_span_are_taken_in_several(monkeypatch):
    blocks = pallas_tpu_backward.Blocks(block=128, tile=128, chunk=64, span=128)
    monkeypatch.setattr(pallas_tpu_backward, "BLOCKS", blocks)
    check("pallas_tpu:interpret", jnp.float32, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [256, 384])
def test_products_as_wide_as_newer_chips_matrix_units(monkeypatch, tile):
    """Of 256 columns, and of what is left of a tile."""
    blocks = pallas_tpu.Blocks(queries=tile, keys=tile, tile=tile, height=128, chunk=64, columns=256)
    monkeypatch.setattr(pallas_tpu, "BLOCKS", blocks)
    backward = pallas_tpu_backward.Blocks(block=tile, tile=tile, chunk=64, span=2 * tile, columns=256)
    monkeypatch.setattr(pallas_tpu_backward, "BLOCKS", backward)
    segments = np.repeat([[3, 1, 0, 1, 2, 0]], [100, 160, 20, 90, 200, 30], axis=1)
    check("pallas_tpu:interpret", jnp.float32, ((1, 1, 520, 600, 16, 8, 24), segments, 0, (1.0, 1.0)))


@pytest.mark.slow
@pytest.mark.parametrize("queries", [700, 901])
def test_of_tiles_that_are_taken_together_one_is_left_over_beside_the_diagonal(monkeypatch, queries):
    blocks = pallas_tpu_backward.Blocks(block=512, tile=128, wide=256, chunk=128, columns=256)
    monkeypatch.setattr(pallas_tpu_backward, "BLOCKS", blocks)
    check("pallas_tpu:interpret", jnp.float32, ((1, 1, queries, 1000, 16, 8, 24), None, 0, (1.0, 1.0)))


def test_a_walk_visits_each_pair_of_blocks_in_which_something_is_seen():
    for T, S, block in ((5, 5, 2), (3, 8, 2), (8, 8, 4), (1, 7, 3), (4, 4, 4)):
        n_T, n_S, offset = -(-T // block), -(-S // block), S - T
        keys, queries, bits, kept = pallas_tpu_backward.walk(n_T, n_S, block, offset).tolist()
        pairs = list(zip(keys, queries, strict=True))
        assert pairs == [(j, i) for j in range(n_S) for i in range(n_T) if j * block <= offset + (i + 1) * block - 1]
        for at, (j, i) in enumerate(pairs):
            ends = [at == min(x for x, pair in enumerate(pairs) if pair[0] == j),
                    at == max(x for x, pair in enumerate(pairs) if pair[0] == j),
                    at == max(x for x, pair in enumerate(pairs) if pair[1] == i)]  # fmt: skip
            assert [bool(bits[at] & bit) for bit in (1, 2, 4)] == ends
        # A block of the output is left once, after it is complete.
        done = [pairs.index((j, i)) for i in range(n_T) for j in [max(j for j, other in pairs if other == i)]]
        for i, at in enumerate(done):
            assert kept[at] == i and kept == sorted(kept)


@EACH
@pytest.mark.parametrize("sizes", [(0, 2, 4, 4), (1, 0, 4, 4), (1, 2, 0, 4), (1, 2, 0, 0)])
def test_without_a_query_nothing_is_computed(implementation, sizes):
    B, H, T, S = sizes
    arrays = [jnp.ones(shape) for shape in ((B, H, T, 8), (B, H, T, 4), (B, H, S, 8), (B, S, 4), (B, H, S, 8))]
    out, pull_back = jax.vjp(lambda *arrays: mla_attention(*arrays, None, 1.0, implementation=implementation), *arrays)
    assert out.shape == (B, H, T, 8)
    for found, x in zip(pull_back(out), arrays, strict=True):
        np.testing.assert_array_equal(found, jnp.zeros_like(x))


@pytest.mark.slow
@EACH
def test_padding_gives_zeros_and_gets_none(implementation):
    (B, H, T, S, C, R, W), segments, _, _ = SOME
    shapes = (B, H, T, C), (B, H, T, R), (B, H, S, C), (B, S, R), (B, H, S, W)
    arrays = [jnp.ones(shape) for shape in shapes]
    ids = jnp.asarray(segments, jnp.int32)
    out, pull_back = jax.vjp(lambda *arrays: mla_attention(*arrays, ids, 1.0, implementation=implementation), *arrays)
    for found in (out, *pull_back(out)):
        rows = segments[:, S - found.shape[-2] :] == 0
        padding = np.broadcast_to(rows[..., None] if found.ndim == 3 else rows[:, None, :, None], found.shape)
        assert (np.asarray(found)[padding] == 0).all()


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 128])
@pytest.mark.parametrize("segments", [None, np.repeat([[1, 0, 2]], [60, 20, 120], axis=1)], ids=["whole", "documents"])
def test_on_simulated_memory_without_a_race(segments, part, monkeypatch):
    """NaN in everything that was not written, an error for reads outside; races are counted."""
    blocks = pallas_tpu.Blocks(queries=128, keys=128, tile=128, height=128, chunk=128, part=part)
    monkeypatch.setattr(pallas_tpu, "BLOCKS", blocks)
    monkeypatch.setattr(pallas_tpu_backward, "BLOCKS", pallas_tpu_backward.Blocks(block=128, tile=128, chunk=128))
    check("pallas_tpu:simulate", jnp.float32, ((1, 2, 180, 200, 16, 8, 16), segments, 0, (1.0, 1.0)))


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("segments", [None, np.repeat([[1, 0, 2]], [60, 20, 420], axis=1)], ids=["whole", "documents"])
def test_a_square_diagonal_on_simulated_memory(segments, dtype, monkeypatch):
    """Blocks of as many queries as keys: what the diagonal's one tile leaves out is neither written nor read."""
    blocks = pallas_tpu.Blocks(queries=256, keys=256, tile=256, height=256, chunk=128, columns=128, part=128)
    monkeypatch.setattr(pallas_tpu, "BLOCKS", blocks)
    monkeypatch.setattr(pallas_tpu_backward, "BLOCKS", pallas_tpu_backward.Blocks(block=256, tile=128, chunk=128))
    check("pallas_tpu:simulate", dtype, ((1, 1, 500, 500, 16, 8, 16), segments, 0, (1.0, 1.0)))


GOOD = {
    "q_content_BHTC": jnp.ones((1, 2, 3, 8)),
    "q_rope_BHTR": jnp.ones((1, 2, 3, 4)),
    "k_content_BHSC": jnp.ones((1, 2, 5, 8)),
    "k_rope_BSR": jnp.ones((1, 5, 4)),
    "v_BHSW": jnp.ones((1, 2, 5, 6)),
    "segments_BS": None,
    "scale": 1.0,
    "implementation": "reference",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "flash"}, "implementation: expected one of reference, pallas_tpu, pallas_gpu"),
        ({"implementation": "reference:interpret"}, "implementation: expected one of"),
        ({"scale": 0.0}, "scale: expected a positive number, got 0.0"),
        ({"v_BHSW": jnp.ones((1, 2, 5, 6), jnp.bfloat16)}, "v_BHSW: expected q_content's dtype"),
        ({"k_rope_BSR": jnp.ones((1, 5, 3))}, r"k_rope_BSR: expected \[1, 5, 4\]"),
        ({"q_rope_BHTR": jnp.ones((1, 2, 4, 4))}, r"q_rope_BHTR: expected \[1, 2, 3, 4\]"),
        ({"k_content_BHSC": jnp.ones((1, 3, 5, 8))}, r"k_content_BHSC: expected \[1, 2, 5, 8\]"),
        ({"segments_BS": jnp.ones((1, 3), jnp.int32)}, r"segments_BS: expected \[1, 5\]"),
        (
            {"k_content_BHSC": jnp.ones((1, 2, 2, 8)), "k_rope_BSR": jnp.ones((1, 2, 4)), "v_BHSW": jnp.ones((1, 2, 2, 6))},
            "q_content_BHTC: expected at most as many queries as keys, 2, got 3",
        ),
    ],
)
def test_wrong_operands_are_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        unchecked(lambda: mla_attention(**(GOOD | change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("blocks", [pallas_tpu.BLOCKS, *pallas_tpu.BLOCKS_OF_CHIP.values()])
def test_the_rows_of_an_iteration_divide_a_block_of_any_number_of_queries(blocks):
    for queries in range(1, 5000):
        block, height = pallas_tpu.queries_of(blocks, queries)
        assert block % height == 0 == height % (128 if blocks.part else blocks.chunk) and height <= blocks.height
        assert block <= blocks.queries and (block == blocks.queries or block >= queries or blocks.part)
        assert height == blocks.height or block % blocks.height or block < blocks.height or blocks.part


@pytest.mark.parametrize("queries", [600, 768])
@pytest.mark.parametrize("blocks", [pallas_tpu.BLOCKS, pallas_tpu.TURNED], ids=["v5", "turned"])
def test_the_tables_blocks_take_any_number_of_queries(blocks, queries):
    rng = np.random.default_rng(0)
    shapes = [(1, 1, queries, 8), (1, 1, queries, 4), (1, 1, queries, 8), (1, queries, 4), (1, 1, queries, 8)]
    operands = Operands(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes), None, 0.3)
    found, expected = (
        module.forward(operands, interpret=True, **how) for module, how in ((pallas_tpu, {"blocks": blocks}), (reference, {}))
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_spans_leave_room_for_the_keys_rotary_gradients():
    """They collect beside the queries' in 60 MiB, of which V3's blocks take some 20."""
    blocks = pallas_tpu_backward.Blocks()
    spans = [pallas_tpu_backward.span_of(blocks, 128, 64, 128, keys) for keys in (4096, 32768, 65536, 131072)]
    assert spans == [32768, 32768, 32768, 10240]
    assert pallas_tpu_backward.span_of(blocks, 192, 64, 256, 32768) == 20480
    assert pallas_tpu_backward.span_of(blocks, 128, 64, 128, 10**6) == blocks.block
    for keys in range(2048, 160_000, 1000):
        span = pallas_tpu_backward.span_of(blocks, 128, 64, 128, keys)
        assert 4 * (64 * keys + 192 * span) <= 40 * 2**20 or span == blocks.block
