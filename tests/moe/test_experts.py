"""Every implementation of the routed experts against one loop over tokens in NumPy float64, values and all gradients."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from dsv3_jax.moe.experts import BLOCK, routed_experts

IMPLEMENTATIONS = ["bucketed", "ragged_dot", "dense"]
NAMES = ["y", "dx", "dgates", "dgate_proj", "dup_proj", "ddown_proj"]


def oracle(x, indices, gates, experts, dy):
    """y and the gradients of <y, dy>, one (token, expert) pair at a time."""
    x, gates, dy, (w_gate, w_up, w_down) = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, gates, dy, experts))
    y, dx, dgates, dw_gate, dw_up, dw_down = (np.zeros_like(a) for a in (x, x, gates, w_gate, w_up, w_down))
    for n, k in np.ndindex(*gates.shape):
        e = int(indices[n, k])
        g, u = x[n] @ w_gate[e], x[n] @ w_up[e]
        sigmoid = 1 / (1 + np.exp(-g))
        h = g * sigmoid * u
        y[n] += gates[n, k] * (h @ w_down[e])
        dgates[n, k] = (h @ w_down[e]) @ dy[n]
        dw_down[e] += gates[n, k] * np.outer(h, dy[n])
        dh = gates[n, k] * (w_down[e] @ dy[n])
        dg, du = dh * u * sigmoid * (1 + g * (1 - sigmoid)), dh * g * sigmoid
        dw_gate[e] += np.outer(x[n], dg)
        dw_up[e] += np.outer(x[n], du)
        dx[n] += w_gate[e] @ dg + w_up[e] @ du
    return [y, dx, dgates, dw_gate, dw_up, dw_down]


def inputs(indices, n_experts, hidden=8, width=5, dtype=jnp.float32, seed=0):
    """x, indices, gates, (gate, up, down), dy: everything of order one, so that no gradient is negligible."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    indices = jnp.asarray(indices, jnp.int32)
    gates = jnp.asarray(rng.uniform(0.1, 1.0, size=indices.shape), jnp.float32)
    ups = [normal(n_experts, hidden, width, scale=hidden**-0.5) for _ in range(2)]
    experts = (*ups, normal(n_experts, width, hidden, scale=width**-0.5))
    return normal(len(indices), hidden), indices, gates, experts, normal(len(indices), hidden)


def random_choices(n_tokens, k, n_experts, seed=0):
    return np.argsort(np.random.default_rng(seed).normal(size=(n_tokens, n_experts)), axis=1)[:, :k]


def apply(x, indices, gates, experts, implementation):
    names = ("gate_proj", "up_proj", "down_proj")
    return routed_experts(x, indices, gates, dict(zip(names, experts, strict=True)), implementation=implementation)


@partial(jax.jit, static_argnames="implementation")
def value_and_gradients(x, indices, gates, experts, dy, implementation):
    y, transpose = jax.vjp(lambda x, gates, experts: apply(x, indices, gates, experts, implementation), x, gates, experts)
    dx, dgates, dexperts = transpose(dy)
    return [y, dx, dgates, *dexperts]


def check_against_oracle(case, implementation, tolerance):
    """Errors relative to the largest element: sums of terms of either sign have no relative error of their own."""
    for name, got, expected in zip(NAMES, value_and_gradients(*case, implementation), oracle(*case), strict=True):
        error = np.max(np.abs(np.asarray(got, np.float64) - expected)) / (np.max(np.abs(expected)) + 1e-30)
        assert error < tolerance, f"{name}: {error}"


# Products of at most a few dozen terms, a few of them in a row: some 2^-24 * sqrt(terms) each, far from a mistake's 1e-1.
FLOAT32 = 3e-6


@st.composite
def cases(draw):
    n_experts = draw(st.integers(1, 6))
    n_tokens, k = draw(st.sampled_from([1, 2, 7, 30])), draw(st.integers(1, n_experts))
    indices = random_choices(n_tokens, k, n_experts, seed=draw(st.integers(0, 99)))
    idle = draw(st.integers(0, 2))
    return inputs(indices, n_experts + idle, hidden=draw(st.sampled_from([1, 6])), width=draw(st.sampled_from([1, 7])))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=6)
@given(case=cases())
def test_values_and_gradients_match_float64_for_any_shape(implementation, case):
    check_against_oracle(case, implementation, FLOAT32)


def loads(*counts):
    """Indices [N, 1] with these loads, in shuffled order."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))[:, None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "indices",
    [
        loads(0, 3 * BLOCK + 1, 0, 0),
        loads(BLOCK, BLOCK - 1, BLOCK + 1, 2 * BLOCK),
        loads(1, 0, 2 * BLOCK + 5, 1),
        np.tile([[3, 1]], (BLOCK + 9, 1)),
        random_choices(3 * BLOCK + 11, 4, 4),
    ],
    ids=["all_on_one_expert", "around_a_block", "very_uneven", "all_tokens_on_the_same_two", "every_expert_chosen"],
)
def test_values_and_gradients_match_float64_for_any_load(implementation, indices):
    check_against_oracle(inputs(indices, 4), implementation, FLOAT32)


@pytest.mark.parametrize("implementation", ["pallas_tpu:interpret", "pallas_gpu:interpret"])
def test_kernels_match_float64_where_some_choices_are_of_no_expert(implementation):
    indices = np.where(np.arange(66)[:, None] % 5 == 0, [[4, 1]], random_choices(66, 2, 4))  # 4 of 4: none
    x, indices, gates, experts, dy = inputs(indices, 4)
    padded = tuple(jnp.concatenate([w, jnp.zeros_like(w[:1])]) for w in experts)
    found = value_and_gradients(x, indices, gates, experts, dy, implementation)
    expected = oracle(x, indices, gates, padded, dy)
    for name, got, want in zip(NAMES, found, expected, strict=True):
        want = want[:4] if name.startswith("d") and want.ndim == 3 else want
        np.testing.assert_allclose(got, want, rtol=0, atol=FLOAT32 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_stays_within_its_own_rounding(implementation):
    case = inputs(random_choices(90, 3, 5), 5, hidden=32, width=16, dtype=jnp.bfloat16)
    # Half a unit in the last place is 2^-9; some five roundings (pre-activations, activation, row, result) come in turn.
    check_against_oracle(case, implementation, 5 * 2**-9)
    y, dx, dgates, *dexperts = value_and_gradients(*case, implementation)
    assert {a.dtype for a in (y, dx, *dexperts)} == {jnp.dtype(jnp.bfloat16)} and dgates.dtype == jnp.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gates_scale_the_experts_and_nothing_else(implementation):
    x, indices, gates, experts, _ = inputs(random_choices(20, 2, 4), 4)
    y, doubled = (apply(x, indices, g, experts, implementation) for g in (gates, 2 * gates))
    np.testing.assert_array_equal(doubled, 2 * y)  # doubling is exact


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_one_tokens_poison_reaches_only_its_own_row_and_its_own_experts(poison):
    # Expert 1's block reaches into the rows of expert 2, which begin with token 0, and padding reads token 0, too.
    indices = np.array([[2, 3]] + [[0, 1]] * 5 + [[1, 4]] * 3 + [[4, 0]] * 2)
    clean = inputs(indices, 6)
    x, _, gates, experts, dy = clean
    poisoned = (x.at[0].set(poison), clean[1], gates.at[0].set(poison), experts, dy.at[0].set(poison))
    untouched = [slice(1, None)] * 3 + [np.array([0, 1, 4, 5])] * 3
    results = (value_and_gradients(*case, "bucketed") for case in (poisoned, clean))
    for name, kept, got, expected in zip(NAMES, untouched, *results, strict=True):
        np.testing.assert_array_equal(got[kept], expected[kept], err_msg=name)


def test_repeated_calls_give_equal_bits_and_new_indices_compile_nothing_new():
    value_and_gradients.clear_cache()
    case = inputs(random_choices(100, 3, 6), 6)
    first, second = (value_and_gradients(*case, "bucketed") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    x, _, gates, experts, dy = case
    for indices in (random_choices(100, 3, 6, seed=5), np.tile([[0, 1, 2]], (100, 1))):
        value_and_gradients(x, jnp.asarray(indices, jnp.int32), gates, experts, dy, "bucketed")
    assert value_and_gradients._cache_size() == 1


def test_recomputation_and_scan_over_layers_leave_the_gradient_unchanged():
    x, indices, gates, experts, _ = inputs(random_choices(70, 2, 4), 4)
    layers = jax.tree.map(lambda w: jnp.stack([w, w[::-1]]), experts)

    def layer(x, weights):
        return x + apply(x, indices, gates, weights, "bucketed")

    def unrolled(x, layers):
        for i in range(2):
            x = layer(x, jax.tree.map(lambda w, i=i: w[i], layers))
        return jnp.sum(x**2)

    def scanned(x, layers):
        return jnp.sum(jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x, layers)[0] ** 2)

    expected, got = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, layers) for f in (unrolled, scanned))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)  # only the order of fusion differs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shard_map_splits_tokens_and_sums_the_weights_gradients(implementation):
    case = inputs(random_choices(24, 2, 4), 4)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    split, whole = P("data"), P()

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(split, split, split, whole, split), out_specs=[split] * 3 + [whole] * 3)
    def sharded(*case):
        return value_and_gradients(*case, implementation)

    for got, expected in zip(sharded(*case), value_and_gradients(*case, implementation), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_auto_on_cpu_is_the_bucketed_program():
    x, indices, gates, experts, _ = inputs(random_choices(8, 2, 4), 4)

    def program(name):
        return str(jax.make_jaxpr(partial(apply, implementation=name))(x, indices, gates, experts))

    programs = {name: program(name) for name in ["auto", *IMPLEMENTATIONS]}
    assert jax.default_backend() != "cpu" or programs["auto"] == programs["bucketed"]
    assert len({programs[name] for name in IMPLEMENTATIONS}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fastest"}, "bucketed.*ragged_dot.*dense.*'fastest'"),
        ({"gates_NK": jnp.ones((2, 1), jnp.bfloat16)}, "gates: expected float32, got bfloat16"),
        ({"x_ND": jnp.ones((2, 3), jnp.bfloat16)}, "expected the dtype of x, bfloat16.*cast"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(change, message):
    w = jnp.ones((2, 3, 3))
    arguments = {"x_ND": jnp.ones((2, 3)), "indices_NK": jnp.zeros((2, 1), jnp.int32), "gates_NK": jnp.ones((2, 1))}
    with pytest.raises(ValueError, match=message):
        routed_experts(**{**arguments, "experts": {"gate_proj": w, "up_proj": w, "down_proj": w}, **change})
