"""Attention for MLA in plain JAX: all scores at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.attention.call import Operands


def _einsum(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _scores(operands: Operands) -> jax.Array:
    """[B, H, T, S]; -inf where a query does not see a key."""
    q, q_rope, k, k_rope, _, segments_BS, scale = operands
    scores = scale * (_einsum("bhtc,bhsc->bhts", q, k) + _einsum("bhtr,bsr->bhts", q_rope, k_rope))
    queries, keys = scores.shape[2:]
    position = jnp.arange(keys, dtype=jnp.int32)
    seen_BTS = (position[None, :] <= position[keys - queries :, None])[None]
    if segments_BS is not None:
        own_BTS = segments_BS[:, keys - queries :, None] == segments_BS[:, None, :]
        seen_BTS = seen_BTS & own_BTS & (segments_BS != 0)[:, None, :]
    return jnp.where(seen_BTS[:, None], scores, -jnp.inf)


def forward(operands: Operands, *, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """As `call.Forward`."""
    scores, v = _scores(operands), operands.v_BHSW
    lse_BHT = jax.nn.logsumexp(scores, axis=-1)
    lse_BHT = jnp.where(lse_BHT > -jnp.inf, lse_BHT, 0.0)
    return _einsum("bhts,bhsw->bhtw", jnp.exp(scores - lse_BHT[..., None]).astype(v.dtype), v).astype(v.dtype), lse_BHT


def backward(
    operands: Operands, lse_BHT: jax.Array, delta_BHT: jax.Array, d_out_BHTW: jax.Array, *, interpret: Any
) -> tuple[jax.Array, ...]:
    """As `call.Backward`."""
    q, q_rope, k, k_rope, v, _, scale = operands
    weights = jnp.exp(_scores(operands) - lse_BHT[..., None])
    d_weights = _einsum("bhtw,bhsw->bhts", d_out_BHTW, v)
    d_scores = (weights * (d_weights - delta_BHT[..., None]) * scale).astype(q.dtype)
    return (
        _einsum("bhts,bhsc->bhtc", d_scores, k).astype(q.dtype),
        _einsum("bhts,bsr->bhtr", d_scores, k_rope).astype(q.dtype),
        _einsum("bhts,bhtc->bhsc", d_scores, q).astype(k.dtype),
        _einsum("bhts,bhtr->bsr", d_scores, q_rope).astype(k.dtype),
        _einsum("bhts,bhtw->bhsw", weights.astype(v.dtype), d_out_BHTW).astype(v.dtype),
    )
