"""The router's choice in plain JAX, by `top_k`."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.router.call import How, Routed, gates_of, scores_of


def choose(logits_NE: jax.Array, bias_E: jax.Array, how: How, *, interpret: Any) -> Routed:
    """As `call.Choose`."""
    n, experts = logits_NE.shape
    scores_NE = scores_of(logits_NE, how.scoring)
    eligible_NE = scores_NE + bias_E[None, :]
    if how.topk_group < how.n_group:
        grouped = eligible_NE.reshape(n, how.n_group, experts // how.n_group)
        group_scores_NG = jax.lax.top_k(grouped, how.group_score_topk)[0].sum(axis=-1)
        kept = jax.lax.top_k(group_scores_NG, how.topk_group)[1]
        is_kept_NG = (kept[:, :, None] == jnp.arange(how.n_group, dtype=kept.dtype)[None, None, :]).any(axis=1)
        eligible_NE = jnp.where(is_kept_NG[:, :, None], grouped, -jnp.inf).reshape(n, experts)
    values, order = jax.lax.top_k(eligible_NE, min(how.k + 1, experts))
    indices_NK = order[:, : how.k]
    margin_N = values[:, how.k - 1] - values[:, how.k] if how.k < experts else jnp.full((n,), jnp.inf)
    return Routed(indices_NK, gates_of(jnp.take_along_axis(scores_NE, indices_NK, axis=1), how, 1), scores_NE, margin_N)
