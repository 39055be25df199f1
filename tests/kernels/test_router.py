"""The router's choice in one pass: every implementation against one token at a time in float64, and against `moe.router`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.kernels.router import pallas_gpu, pallas_tpu
from dsv3_jax.kernels.router.api import choose
from dsv3_jax.moe.router import route
from oracles import checks_router, numpy_moe, vectors
from oracles.accelerators import HERE
from oracles.compiling import quick_jit
from oracles.unchecked import unchecked

IMPLEMENTATIONS = ["reference", "pallas_tpu:interpret", "pallas_gpu:interpret", *HERE]
# Sides that are no powers of two, of experts and of groups, and more than one register of lanes.
LARGE = {
    "v3": (256, dict(num_experts_per_tok=8, n_group=8, topk_group=4, routed_scaling_factor=2.5)),
    "v2": (160, dict(num_experts_per_tok=6, n_group=8, topk_group=3, group_score_topk=1, scoring_func="softmax",
                     norm_topk_prob=False, routed_scaling_factor=16.0)),
    "384": (384, dict(num_experts_per_tok=8, n_group=6, topk_group=3, group_score_topk=3)),
}  # fmt: skip
SETTINGS = checks_router.SETTINGS | LARGE


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "BLOCKS", pallas_tpu.Blocks(256))
    monkeypatch.setattr(pallas_gpu, "BLOCKS", pallas_gpu.Blocks(4, 4))


def problem(name, tokens, seed, spread=1.5):
    experts, setting = SETTINGS[name]
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (tokens, experts)).astype(np.float32)
    bias = (0.15 * rng.standard_normal(experts) - rng.integers(0, 3)).astype(np.float32)
    return checks_router.router_config(experts, setting), setting, logits, bias


def run(config, logits, bias, implementation):
    fn = quick_jit(lambda logits, bias: choose(logits, bias, config, implementation=implementation))
    return fn(jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32))


def by_the_model(config, logits, bias):
    """Logits that are these numbers, exactly: the router's weight is the identity."""
    fn = quick_jit(lambda x, bias: route(x, jnp.eye(x.shape[-1]), bias, config))
    return fn(jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32))


def check(implementation, name, tokens, seed):
    config, setting, logits, bias = problem(name, tokens, seed)
    found = run(config, logits, bias, implementation)
    expected = numpy_moe.route(logits.astype(np.float64), bias.astype(np.float64), **setting)
    checks_router.assert_routing_equals(found, expected)
    assert found.indices.dtype == jnp.int32 and found.gates.dtype == jnp.float32
    theirs = by_the_model(config, logits, bias)
    same_as_the_model(found, theirs)


def same_as_the_model(found, theirs):
    np.testing.assert_array_equal(found.indices, theirs.indices)
    # Scores to a unit in the last place or two: exponentials are a compiler's own, and the order of a softmax's sum.
    np.testing.assert_allclose(found.scores, theirs.scores, rtol=5e-7, atol=1e-37)
    np.testing.assert_allclose(found.gates, theirs.gates, rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(found.margin, theirs.margin, rtol=0, atol=5e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["v3", "v2", "every_expert", "no_groups"])
def test_tokens_choose_as_one_at_a_time_in_float64(implementation, name):
    check(implementation, name, 300 if name == "v2" else 40, 0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(SETTINGS)), st.sampled_from([40, 129, 300]), st.integers(0, 2**16))
def test_any_tokens_choose_as_one_at_a_time_in_float64(implementation, name, tokens, seed):
    check(implementation, name, tokens, seed)


TIES = dict(num_experts_per_tok=3, n_group=3, topk_group=2, group_score_topk=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lower_index_in_groups_and_experts(implementation):
    """Three values for twelve experts: ties everywhere, between experts and between groups. Nothing is near but equal."""
    rng = np.random.default_rng(0)
    for limit in (1, 2):
        config = checks_router.router_config(12, TIES | dict(topk_group=limit))
        logits = rng.choice([-1.0, 0.0, 1.0], (200, 12))
        found, theirs = run(config, logits, np.zeros(12), implementation), by_the_model(config, logits, np.zeros(12))
        np.testing.assert_array_equal(found.indices, theirs.indices)
        np.testing.assert_array_equal(found.margin, theirs.margin)
    assert (np.asarray(found.margin) == 0).mean() > 0.2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_logits_are_chosen_as_the_model_does(implementation):
    config = checks_router.router_config(12, TIES)
    rng = np.random.default_rng(1)
    logits, bias = rng.choice([-3e38, -100.0, -1e-30, 0.0, 1e-30, 100.0, 3e38], (60, 12)), 0.1 * rng.standard_normal(12)
    same_as_the_model(run(config, logits, bias, implementation), by_the_model(config, logits, bias))
    # Infinite ones as finite ones whose sigmoid is the same.
    infinite = np.where(np.abs(logits) > 1e38, np.copysign(np.inf, logits), logits)
    for ours, theirs in zip(*(run(config, v, bias, implementation) for v in (infinite, logits)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_is_of_its_own_token_alone_and_indices_stay_distinct(implementation):
    config, _, logits, bias = problem("v3", 40, 0)
    broken = logits.copy()
    broken[3, 5] = broken[3, 200] = np.nan
    broken[39] = np.nan
    found, clean = run(config, broken, bias, implementation), run(config, logits, bias, implementation)
    for ours, theirs in zip(found, clean, strict=True):
        np.testing.assert_array_equal(np.delete(ours, [3, 39], axis=0), np.delete(theirs, [3, 39], axis=0))
    if implementation != "reference":
        assert found.indices[3, :2].tolist() == [5, 200]
    assert all(sorted(set(row.tolist())) == sorted(row.tolist()) and 0 <= row.min() <= row.max() < 256
               for row in np.asarray(found.indices))  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gates_are_free_of_the_bias(implementation):
    """A bias that is equal for all experts changes no bit of a gate, even where it swallows the scores."""
    config = checks_router.router_config(12, SETTINGS["no_groups"][1])
    logits = np.repeat(np.linspace(-6, 6, 12, dtype=np.float32)[None, :], 3, axis=0)
    plain, lifted = (run(config, logits, np.full(12, offset), implementation) for offset in (0.0, 64.0))
    np.testing.assert_array_equal(plain.indices, lifted.indices)
    np.testing.assert_array_equal(plain.gates, lifted.gates)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["v3", "v2"])
def test_the_gradient_is_that_of_the_model_s_router(implementation, name):
    config, _, logits, bias = problem(name, 30, 2)
    rng = np.random.default_rng(3)
    dgates, dscores = (
        jnp.asarray(rng.standard_normal((30, n)), jnp.float32) for n in (config.num_experts_per_tok, logits.shape[1])
    )

    def ours(logits, bias):
        found = choose(logits, bias, config, implementation=implementation)
        return (found.gates * dgates).sum() + (found.scores * dscores).sum()

    def theirs(logits, bias):
        found = route(logits, jnp.eye(logits.shape[1]), bias, config)
        return (found.gates * dgates).sum() + (found.scores * dscores).sum()

    operands = jnp.asarray(logits), jnp.asarray(bias)
    found, expected = (quick_jit(jax.grad(f, argnums=(0, 1)))(*operands) for f in (ours, theirs))
    # A few float32 roundings of terms that are as large as the largest.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=2e-6 * float(jnp.abs(expected[0]).max()))
    np.testing.assert_array_equal(found[1], np.zeros_like(bias))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_none_and_more_sides_of_tokens(implementation):
    config, _, logits, bias = problem("v3", 6, 4)
    flat = run(config, logits, bias, implementation)
    for shape in ((2, 3), (6, 1)):
        found = run(config, logits.reshape(*shape, -1), bias, implementation)
        for ours, theirs in zip(found, flat, strict=True):
            np.testing.assert_array_equal(ours, np.asarray(theirs).reshape(ours.shape))
        assert found.indices.shape == (*shape, 8) and found.margin.shape == shape
    none = run(config, logits[:0], bias, implementation)
    assert [v.shape for v in none] == [(0, 8), (0, 8), (0, 256), (0,)]


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2", "v3"])
def test_on_simulated_memory_without_a_race(name):
    """NaN in everything that was not written, an error for reads outside; races are counted."""
    check("pallas_tpu:simulate", name, 150, 0)


def test_each_byte_moves_once(monkeypatch):
    monkeypatch.undo()
    for n, experts, k in ((4096, 256, 8), (32768, 256, 8), (1000, 160, 6)):
        least = 4 * (2 * n * experts + n * (2 * k + 1) + experts)
        assert least <= pallas_tpu.bytes_moved(n, experts, k) <= 1.001 * least


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="top_k"), "implementation: expected one of reference, pallas_tpu, pallas_gpu"),
        (dict(logits=jnp.zeros((2, 16), jnp.bfloat16)), "logits: expected float32"),
        (dict(logits=jnp.zeros((2, 15))), r"logits: expected float32 \[..., 16\]"),
        (dict(bias_E=jnp.zeros(15)), "bias_E: expected float32"),
        (dict(scoring_func="math:exp"), "scoring_func: expected one that the kernels have"),
        (dict(topk_method="math:exp"), "topk_method: expected one that the kernels have"),
    ],
)
def test_wrong_operands_are_one_line(change, message):
    config = checks_router.router_config(16, vectors.ROUTER_SETTINGS)
    operands = dict(logits=jnp.zeros((2, 16)), bias_E=jnp.zeros(16), implementation="reference")
    setting = {name: value for name, value in change.items() if name not in operands}
    operands |= {name: value for name, value in change.items() if name in operands}
    for name, value in setting.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message) as error:
        unchecked(lambda: choose(operands.pop("logits"), operands.pop("bias_E"), config, **operands))
    assert "\n" not in str(error.value)
