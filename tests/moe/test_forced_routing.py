"""Experts from outside in place of the router's choice: in one router, and through the whole model, against float64."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.mtp import mtp_forward
from dsv3_jax.model.transformer import forward, make_context
from dsv3_jax.moe.router import route
from oracles import checks_router, numpy_model, numpy_moe
from oracles.cases import load_case
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.numpy_layers import numerical_gradient

TOKENS, HIDDEN = 12, 5
FREE = np.arange(TOKENS) % 3 == 0  # every third token chooses itself


def random_experts(rng, shape, experts, k):
    """int32 [*shape, k], distinct within a token and in no order."""
    return np.argsort(rng.random((*shape, experts)), axis=-1)[..., :k].astype(np.int32)


def router_problem(name="v3", **settings):
    experts, setting = checks_router.SETTINGS[name]
    rng = np.random.default_rng(4)
    x, weight = rng.standard_normal((TOKENS, HIDDEN)), rng.standard_normal((HIDDEN, experts))
    bias = 0.15 * rng.standard_normal(experts)
    forced = random_experts(rng, (TOKENS,), experts, setting["num_experts_per_tok"])
    forced[FREE, 0] = experts  # one entry says it; the others are not read
    return checks_router.router_config(experts, setting | settings), setting, x, weight, bias, forced


def as_float32(*arrays):
    return [np.asarray(a, np.float32).astype(np.float64) for a in arrays]


# Both ways of choosing, a score function that is not normalised, and a choice of which nothing is left out.
@pytest.mark.parametrize("name, implementation", [
    ("v3", "top_k"), ("v3", "pallas_tpu:interpret"), ("v2", "top_k"), ("every_expert", "top_k"),
])  # fmt: skip
def test_a_token_uses_the_experts_it_is_forced_to_with_gates_from_its_own_scores(name, implementation):
    config, setting, x, weight, bias, forced = router_problem(name)
    config = replace(config, router_implementation=implementation)
    fn = quick_jit(lambda x, w, b, f: route(x, w, b, config, f))
    args = [jnp.asarray(a, jnp.float32) for a in (x, weight, bias)]
    found = fn(*args, jnp.asarray(forced))
    np.testing.assert_array_equal(found.indices[~FREE], forced[~FREE])
    x, weight, bias = as_float32(x, weight, bias)
    expected = numpy_moe.route(x @ weight, bias, forced=forced, **setting)
    np.testing.assert_array_equal(found.indices, expected["indices"])  # the free ones' too
    # Five products of order 1 and a sigmoid or a softmax, of gates up to the scaling factor.
    scale = setting.get("routed_scaling_factor", 1.0)
    np.testing.assert_allclose(found.gates, expected["gates"], rtol=0, atol=1e-6 * scale)
    assert found.indices.dtype == jnp.int32 and found.gates.dtype == jnp.float32

    own = fn(*args, jnp.full_like(forced, len(bias)))
    np.testing.assert_allclose(own.margin, expected["margin"], rtol=0, atol=1e-6)
    for field in ("margin", "scores", "logits"):  # of the token's own choice, whoever made the one that counts
        np.testing.assert_array_equal(getattr(found, field), getattr(own, field))
    for field in ("indices", "gates"):
        np.testing.assert_array_equal(getattr(found, field)[FREE], getattr(own, field)[FREE])
    replayed = fn(*args, own.indices)
    for first, second in zip(own, replayed, strict=True):
        np.testing.assert_array_equal(first, second)
    plain = quick_jit(lambda x, w, b: route(x, w, b, config))(*args)
    np.testing.assert_array_equal(plain.indices, own.indices)
    np.testing.assert_allclose(plain.gates, own.gates, rtol=1e-6)  # another program


@pytest.mark.parametrize("implementation", ["top_k", "pallas_tpu:interpret"])
def test_gradient_reaches_the_router_through_the_gates_of_forced_experts(implementation):
    config, setting, x, weight, bias, forced = router_problem(routed_scaling_factor=2.5)
    config = replace(config, router_implementation=implementation)
    x, weight, bias = as_float32(x, weight, bias)
    towards = np.random.default_rng(5).standard_normal(forced.shape)

    def ours(weight):
        routing = route(jnp.asarray(x, jnp.float32), weight, jnp.asarray(bias, jnp.float32), config, jnp.asarray(forced))
        return (routing.gates * jnp.asarray(towards, jnp.float32)).sum()

    def reference(weight):
        routing = numpy_moe.route(x @ weight, bias, forced=forced, **setting | {"routed_scaling_factor": 2.5})
        return float((routing["gates"] * towards).sum())

    actual = quick_jit(jax.grad(ours))(jnp.asarray(weight, jnp.float32))
    expected = numerical_gradient(reference, weight)
    used = np.isin(np.arange(len(bias)), forced)
    assert (np.abs(expected[:, used]) > 1e-4).any(axis=0).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)  # twelve tokens' sums of order 1 in float32


def test_experts_of_another_number_are_refused():
    config, _, x, weight, bias, forced = router_problem()
    args = [jnp.asarray(a, jnp.float32) for a in (x, weight, bias)]
    with pytest.raises(
        ValueError, match=r"^forced: expected experts \[12, 4\], got \[12, 1\]; give each token num_experts_per_tok"
    ):
        jax.eval_shape(lambda *args: route(*args, config, jnp.asarray(forced[:, :1])), *args)


# The whole model ------------------------------------------------------------------------------------------------------------


@functools.cache
def whole_model():
    """The stored checkpoint that has MTP, its module twice, and one compiled program that takes experts."""
    released, tensors, expected = load_case("mtp")
    module, second = (f"model.layers.{released['num_hidden_layers'] + i}." for i in range(2))
    tensors = tensors | {name.replace(module, second): t for name, t in tensors.items() if name.startswith(module)}
    released = released | {"num_nextn_predict_layers": 2}
    config = model_config(released)
    params, bias = from_checkpoint(tensors, config)
    tokens = np.asarray(expected["input_ids"], np.int32)

    def run(params, bias, tokens, forced):
        n_main = config.n_main_moe_layers
        context = make_context(jnp.ones_like(tokens), config, cross_document=True)
        main = forward(params, bias, tokens, context, config, forced_LBTK=forced[:n_main])
        return main, mtp_forward(params, bias, tokens, main, context, config, forced_LBTK=forced[n_main:])

    compiled = quick_jit(run)
    free = np.full((config.n_moe_layers, *tokens.shape, config.num_experts_per_tok), config.n_routed_experts, np.int32)

    def with_experts(forced):
        return jax.tree.map(np.asarray, compiled(params, bias, jnp.asarray(tokens), jnp.asarray(forced)))

    return released, tensors, config, tokens, free, with_experts


def experts_of(found):
    main, depths = found
    return np.concatenate([main.layers.indices, *(d.layer.indices[None] for d in depths)])


def test_a_pass_forced_to_its_own_experts_is_the_pass_to_the_last_bit():
    *_, free, run = whole_model()
    first = run(free)
    again = run(experts_of(first))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    main, (depth, _) = first
    stored = load_case("mtp").expected
    np.testing.assert_allclose(main.normed_BTD, stored["hidden_final"], rtol=0, atol=1e-4)  # as in test_transformer
    known = stored["mtp_hidden"].shape[1]
    np.testing.assert_allclose(depth.residual_BTD[:, :known], stored["mtp_hidden"], rtol=0, atol=1e-4)


def test_a_pass_forced_to_any_experts_equals_the_float64_model_with_these():
    released, tensors, config, tokens, free, run = whole_model()
    rng = np.random.default_rng(0)
    forced = random_experts(rng, free.shape[:-1], config.n_routed_experts, config.num_experts_per_tok)
    is_free = rng.random(forced.shape[:-1]) < 0.3
    forced[is_free] = config.n_routed_experts
    main, depths = found = run(forced)
    np.testing.assert_array_equal(experts_of(found)[~is_free], forced[~is_free])

    layers = dict(enumerate(forced, start=config.n_dense_layers))
    expected = numpy_model.forward(tensors, released, tokens, forced=layers)
    modules = numpy_model.mtp_forward(tensors, released, expected, tokens, forced=layers)
    ours = [jax.tree.map(lambda a, i=i: a[i], main.layers) for i in range(config.n_main_moe_layers)]
    ours += [depth.layer for depth in depths]
    for routing, wanted in zip(ours, [*expected["routing"].values(), *(m["routing"] for m in modules)], strict=True):
        known = wanted["indices"].shape[1]  # the last tokens have nothing to look ahead at
        np.testing.assert_array_equal(routing.indices[:, :known], wanted["indices"])
        np.testing.assert_allclose(routing.gates[:, :known], wanted["gates"], rtol=0, atol=1e-5)
    # As for the stored cases (tests/model/test_transformer.py); the residual stream's entries reach 10.
    np.testing.assert_allclose(main.normed_BTD, expected["hidden_final"], rtol=0, atol=1e-4)
    for depth, module in zip(depths, modules, strict=True):
        np.testing.assert_allclose(depth.residual_BTD[:, : module["hidden"].shape[1]], module["hidden"], rtol=0, atol=1e-4)
    assert np.abs(main.normed_BTD - run(free)[0].normed_BTD).max() > 0.1  # it is another pass
