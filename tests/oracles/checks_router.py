"""Checks of the router against known vectors and the float64 reference; run by its tests, and by the mutants."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Fp8Recipe, ModelConfig
from dsv3_jax.moe import router
from oracles import numpy_moe, vectors
from oracles.compiling import quick_jit

# (experts, settings): shapes are few because each is compiled, values many. K / kept groups is 2 in the first alone.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "v3": (16, dict(vectors.ROUTER_SETTINGS)),
    "one_kept_group": (12, dict(num_experts_per_tok=3, n_group=3, topk_group=1, routed_scaling_factor=1.8)),
    "more_experts_than_two_a_group": (12, dict(num_experts_per_tok=6, n_group=4, topk_group=2, routed_scaling_factor=2.5)),
    "no_groups": (12, dict(num_experts_per_tok=5, routed_scaling_factor=2.446)),
    "v2": (12, dict(num_experts_per_tok=4, n_group=3, topk_group=2, group_score_topk=1, scoring_func="softmax",
                    norm_topk_prob=False, routed_scaling_factor=16.0)),
    "every_expert": (6, dict(num_experts_per_tok=6)),
}  # fmt: skip


def router_config(experts: int, settings: dict[str, Any]) -> ModelConfig:
    defaults = dict(n_group=1, topk_group=1, routed_scaling_factor=1.0)
    method = "group_limited_greedy" if settings.get("group_score_topk") == 1 else "noaux_tc"
    return ModelConfig(n_routed_experts=experts, topk_method=method, **defaults | settings)


def run_router(logits: np.ndarray, bias: np.ndarray, config: ModelConfig) -> router.Routing:
    """Routes tokens [N, E] whose logits are these numbers, exactly: the router's weight is the identity."""
    x, weight = jnp.asarray(logits, jnp.float32), jnp.eye(logits.shape[1], dtype=jnp.float32)
    return quick_jit(lambda x, bias: router.route(x, weight, bias, config))(x, jnp.asarray(bias, jnp.float32))


def assert_routing_equals(
    actual: router.Routing, expected: dict[str, Any], *, decided_by: float = 1e-5, logit_error: float = 0.0
) -> None:
    """Same choice, in the same order, wherever float64 decides it by more than rounding; same gates there.

    `logit_error`: by how much the logits may differ; a sigmoid passes on a quarter of it at most.
    """
    scores = np.take_along_axis(expected["biased"], expected["indices"], -1)
    order_margin = -np.diff(scores, axis=-1).max(axis=-1, initial=-np.inf)
    clear = np.minimum(np.minimum(expected["margin"], expected["group_margin"]), order_margin) > decided_by
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(actual.indices)[clear], expected["indices"][clear])
    # Gates are at most the scaling factor: a few float32 roundings of it.
    scale = float(np.abs(expected["gates"]).max())
    np.testing.assert_allclose(np.asarray(actual.gates)[clear], expected["gates"][clear], rtol=2e-6, atol=1e-7 * scale)
    np.testing.assert_allclose(np.asarray(actual.margin)[clear], expected["margin"][clear], rtol=0, atol=1e-6)
    np.testing.assert_allclose(actual.scores, expected["scores"], rtol=0, atol=3e-7 + logit_error / 4)


def check_known_choices() -> None:
    config = router_config(16, vectors.ROUTER_SETTINGS)
    for bias, known in ((vectors.ROUTER_BIAS, vectors.ROUTER_WITH_BIAS), (np.zeros(16), vectors.ROUTER_WITHOUT_BIAS)):
        routing = run_router(vectors.ROUTER_LOGITS[None, :], bias, config)
        assert routing.indices[0].tolist() == known["indices"]
        np.testing.assert_allclose(routing.gates[0], known["gates"], atol=1e-6)
        assert abs(float(routing.gates.sum()) - 2.5) < 1e-6


def check_negative_scores_of_kept_groups() -> None:
    """A kept group's experts are chosen though their biased scores are negative and the dropped groups' are not."""
    config = router_config(8, vectors.FILL_SETTINGS)
    routing = run_router(vectors.FILL_LOGITS[None, :], vectors.FILL_BIAS, config)
    assert routing.indices[0].tolist() == vectors.FILL_MINUS_INF["indices"]
    np.testing.assert_allclose(routing.gates[0], vectors.FILL_MINUS_INF["gates"], atol=1e-6)


def check_random_choices(name: str, seed: int = 0, tokens: int = 60) -> None:
    experts, settings = SETTINGS[name]
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (tokens, experts)).astype(np.float32)
    for offset in (0.0, -2.0):  # with -2 every biased score is negative
        bias = (0.15 * rng.standard_normal(experts) + offset).astype(np.float32)
        expected = numpy_moe.route(logits.astype(np.float64), bias.astype(np.float64), **settings)
        assert_routing_equals(run_router(logits, bias, router_config(experts, settings)), expected)


def check_all_random_choices() -> None:
    for name in SETTINGS:
        check_random_choices(name)


def check_gates_are_free_of_the_bias() -> None:
    """A bias that is equal for all experts changes no choice and no bit of a gate, even where it swallows the scores."""
    config = router_config(12, SETTINGS["no_groups"][1])
    logits = np.repeat(np.linspace(-6, 6, 12, dtype=np.float32)[None, :], 3, axis=0)
    plain, lifted = (run_router(logits, np.full(12, offset), config) for offset in (0.0, 64.0))
    np.testing.assert_array_equal(plain.indices, lifted.indices)
    np.testing.assert_array_equal(plain.gates, lifted.gates)


def check_router_computes_in_float32() -> None:
    """BF16 tokens are read as they are; logits, scores and gates lose nothing on the way, nor to FP8 beside them."""
    for recipe in (None, Fp8Recipe()):
        _check_float32_with(recipe)


def _check_float32_with(recipe: Fp8Recipe | None) -> None:
    rng = np.random.default_rng(3)
    x, weight = jnp.asarray(rng.standard_normal((40, 24)), jnp.bfloat16), rng.standard_normal((24, 16)).astype(np.float32)
    config = dataclasses.replace(router_config(16, vectors.ROUTER_SETTINGS), fp8=recipe)
    bias = jnp.asarray(vectors.ROUTER_BIAS, jnp.float32)
    actual = quick_jit(lambda x, w: router.route(x, w, bias, config))(x, jnp.asarray(weight))
    logits = np.asarray(x, np.float64) @ weight.astype(np.float64)
    assert {str(a.dtype) for a in (actual.gates, actual.scores, actual.logits, actual.margin)} == {"float32"}
    logit_error = 4e-6  # 24 terms of order 1, partial sums of order 10; BF16 errs by 1e-2
    np.testing.assert_allclose(actual.logits, logits, rtol=0, atol=logit_error)
    expected = numpy_moe.route(logits, np.asarray(bias, np.float64), **vectors.ROUTER_SETTINGS)
    assert_routing_equals(actual, expected, logit_error=logit_error)
