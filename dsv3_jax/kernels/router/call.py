"""What the implementations of the router's choice have in common: how they are called."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

GATE_EPS = 1e-20  # released code's guard in the normalisation


class How(NamedTuple):
    scoring: str  # sigmoid | softmax
    k: int  # experts of a token
    n_group: int
    topk_group: int  # n_group: no limit
    group_score_topk: int
    normalised: bool
    factor: float


class Routed(NamedTuple):
    indices_NK: jax.Array
    gates_NK: jax.Array
    scores_NE: jax.Array
    margin_N: jax.Array


class Choose(Protocol):
    def __call__(self, logits_NE: jax.Array, bias_E: jax.Array, how: How, *, interpret: Any) -> Routed:
        """At least one token; all float32."""


def scores_of(logits: jax.Array, scoring: str) -> jax.Array:
    """Of rows that are whole."""
    if scoring == "sigmoid":
        return jax.nn.sigmoid(logits)
    powers = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def gates_of(chosen: jax.Array, how: How, axis: int) -> jax.Array:
    """Eq. 13 from the chosen experts' affinities, which lie along `axis`."""
    if how.normalised:
        chosen = chosen / (chosen.sum(axis=axis, keepdims=True) + GATE_EPS)
    return chosen * how.factor
