"""The router: affinities, node-limited selection on biased scores, gates from unbiased ones, eqs. 12-16 [§2.1.2]. Float32.

A score function maps logits [..., E] to affinities [..., E]. A selector maps biased scores [..., E] to the same with -inf
wherever a token may not choose; the top-k of what it returns is chosen. Both are names: built in, or
`package.module:function` with these signatures (`function(logits)`; `function(biased, config)`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import remat
from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.linear import linear
from dsv3_jax.fp8.precision import products
from dsv3_jax.kernels.modes import chosen
from dsv3_jax.kernels.router.api import choose
from dsv3_jax.kernels.router.call import GATE_EPS
from dsv3_jax.parallel.collectives import varying_like
from dsv3_jax.plugins import resolve


class Routing(NamedTuple):
    """What one router decided for every token; stacked by layer in a model's output."""

    indices: Int[Array, "*batch K"]  # the experts used: by descending biased score, ties to the lower id; or as forced
    gates: Float[Array, "*batch K"]  # normalised and scaled
    scores: Float[Array, "*batch E"]  # affinities s, unbiased
    logits: Float[Array, "*batch E"]
    margin: Float[Array, "*batch"]  # own choice: biased score of its last expert minus that of the first one not; inf if none


def group_limited(biased: Float[Array, "*batch E"], config: ModelConfig) -> Float[Array, "*batch E"]:
    """Keeps the `topk_group` groups with the largest sum of their `group_score_topk` largest biased scores."""
    if config.topk_group == config.n_group:
        return biased
    grouped = biased.reshape(*biased.shape[:-1], config.n_group, -1)
    group_scores = jax.lax.top_k(grouped, config.group_score_topk)[0].sum(axis=-1)
    kept = jax.lax.top_k(group_scores, config.topk_group)[1]
    is_kept = one_hot(kept, config.n_group).any(axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(biased.shape)


def unlimited(biased: Float[Array, "*batch E"], config: ModelConfig) -> Float[Array, "*batch E"]:
    """Every expert may be chosen."""
    return biased


def _softmax(logits: Array) -> Array:
    return jax.nn.softmax(logits, axis=-1)


SCORE_FUNCTIONS: dict[str, Callable[..., Array]] = {"sigmoid": jax.nn.sigmoid, "softmax": _softmax}
SELECTORS: dict[str, Callable[..., Array]] = {
    "noaux_tc": group_limited,
    "group_limited_greedy": group_limited,
    "greedy": unlimited,
}


def route(
    x: Float[Array, "*batch D"],
    weight_DE: Float[Array, "D E"],
    bias_E: Float[Array, " E"],
    config: ModelConfig,
    forced: Int[Array, "*batch K"] | None = None,
) -> Routing:
    """Eqs. 12-16. The bias moves selection only: no gradient flows through it or through the choice.

    `forced`, int32: distinct experts to use instead of the token's choice, in this order; where the first is E (none), the
    token is free. Gates are of the experts used, from the token's own scores. Raises ValueError if its K is not the model's.
    """
    own = _own_choice(x, weight_DE, bias_E, config)
    return own if forced is None else _forced_to(own, forced, config)


def _forced_to(own: Routing, forced: Int[Array, "*batch K"], config: ModelConfig) -> Routing:
    """Forced and free tokens go through the same operations, so that a pass and its replay are equal to the last bit."""
    if forced.shape != own.indices.shape:
        expected, got = list(own.indices.shape), list(forced.shape)
        raise ValueError(f"forced: expected experts {expected}, got {got}; give each token num_experts_per_tok of them")
    is_free = forced[..., :1] >= config.n_routed_experts
    indices = jnp.where(is_free, own.indices, forced)
    return own._replace(indices=indices, gates=gates(own.scores, indices, config))


def _own_choice(
    x: Float[Array, "*batch D"], weight_DE: Float[Array, "D E"], bias_E: Float[Array, " E"], config: ModelConfig
) -> Routing:
    x, weight_DE, fp8 = x.astype(jnp.float32), weight_DE.astype(jnp.float32), products(config, "gate")
    if fp8 is None:
        logits = jnp.matmul(x, weight_DE, precision="highest", preferred_element_type=jnp.float32)
    else:  # not the report's: to see what it does
        x, weight_DE = varying_like((x, weight_DE), (x, weight_DE))
        logits = linear(x, weight_DE, fp8)
    logits = remat.name(logits, remat.ROUTER)
    how = _implementation(config)
    if how != "top_k":
        choice = choose(logits, varying_like(logits, bias_E), config, implementation=how)
        return Routing(choice.indices, choice.gates, choice.scores, logits, choice.margin)
    scores = resolve("scoring_func", config.scoring_func, SCORE_FUNCTIONS)(logits)
    _require_like(logits, scores, "scoring_func", config.scoring_func)
    biased = jax.lax.stop_gradient(scores) + bias_E.reshape((1,) * (scores.ndim - 1) + (-1,))
    eligible = resolve("topk_method", config.topk_method, SELECTORS)(biased, config)
    _require_like(logits, eligible, "topk_method", config.topk_method)
    k = config.num_experts_per_tok
    values, order = jax.lax.top_k(eligible, min(k + 1, config.n_routed_experts))
    indices = order[..., :k]
    margin = values[..., k - 1] - values[..., k] if k < config.n_routed_experts else jnp.full(scores.shape[:-1], jnp.inf)
    return Routing(indices, gates(scores, indices, config), scores, logits, margin)


def _implementation(config: ModelConfig) -> str:
    """Of the choice. Somebody else's functions have no kernel: left to choose, they run without."""
    builtin = config.scoring_func in SCORE_FUNCTIONS and config.topk_method in SELECTORS
    return chosen(config.router_implementation, "top_k", possible=builtin)


def check_router(config: ModelConfig) -> None:
    """Raises ValueError if the score function or the selector cannot be loaded or does not keep to its signature."""
    shapes = (1, 1), (1, config.n_routed_experts), (config.n_routed_experts,)
    jax.eval_shape(lambda x, w, b: route(x, w, b, config), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))


def _require_like(logits: Array, returned: Any, kind: str, name: str) -> None:
    """Somebody else's function keeps to the signature."""
    shape, dtype = getattr(returned, "shape", None), getattr(returned, "dtype", None)
    if (shape, dtype) != (logits.shape, logits.dtype):
        raise ValueError(f"{kind}: {name!r} returned {dtype} {shape}, expected {logits.dtype} {logits.shape}")


def gates(scores: Float[Array, "*batch E"], indices: Int[Array, "*batch K"], config: ModelConfig) -> Float[Array, "*batch K"]:
    """Eq. 13: the chosen experts' unbiased affinities, normalised if `norm_topk_prob`, scaled once."""
    # A masked sum instead of a gather: its gradient is elementwise, where a gather's would be a scatter.
    chosen = jnp.where(one_hot(indices, scores.shape[-1]), scores[..., None, :], 0.0).sum(axis=-1)
    if config.norm_topk_prob:
        chosen = chosen / (chosen.sum(axis=-1, keepdims=True) + GATE_EPS)
    return chosen * config.routed_scaling_factor


def one_hot(indices: Int[Array, "*batch K"], size: int) -> Array:
    """bool [*batch, K, size]: which expert (or group) each choice is."""
    return indices[..., None] == jnp.arange(size, dtype=indices.dtype).reshape((1,) * indices.ndim + (-1,))
