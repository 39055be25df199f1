"""Attention over a cache of latents in plain JAX: all of a sequence's pages gathered, and what is not seen left out."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.decode.work import runs
from dsv3_jax.kernels.tiles import precision_of


def attend(
    q_BNK: jax.Array,
    cache_PSK: jax.Array,
    table_BM: jax.Array,
    length_B: jax.Array,
    *,
    heads: int,
    latent: int,
    scale: float,
    splits: int,
    dtype: Any,
    name: str,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """As `call.Attend`."""
    batch, n, width = q_BNK.shape
    size = table_BM.shape[1] * cache_PSK.shape[1]
    rows_BSK = jnp.take(cache_PSK[..., :width], table_BM, axis=0, mode="clip").reshape(batch, size, width)
    row_S = jnp.arange(size, dtype=jnp.int32)
    visible_B = jnp.clip(length_B, 0, size)
    # A weight of zero would not keep out NaN.
    rows_BSK = jnp.where((row_S[None, :] < visible_B[:, None])[..., None], rows_BSK, jnp.zeros((), rows_BSK.dtype))
    precision = precision_of(q_BNK)
    kind = jnp.float32
    scores_BNS = jnp.einsum("bnk,bsk->bns", q_BNK, rows_BSK, precision=precision, preferred_element_type=kind) * scale
    seen_BN = length_B[:, None] - n // heads + 1 + (jnp.arange(n, dtype=jnp.int32) // heads)[None, :]
    first_BX, end_BX = runs(visible_B, 1, splits)

    def split(first_B: jax.Array, end_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        end_BN = jnp.minimum(end_B[:, None], seen_BN)
        own_BNS = (row_S[None, None, :] >= first_B[:, None, None]) & (row_S[None, None, :] < end_BN[..., None])
        scores = jnp.where(own_BNS, scores_BNS, -jnp.inf)
        top_BN1 = scores.max(axis=-1, keepdims=True, initial=jnp.finfo(kind).min)
        weights = jnp.exp(scores - top_BN1)
        total_BN1 = weights.sum(axis=-1, keepdims=True)
        value = jnp.einsum(
            "bns,bsc->bnc",
            weights.astype(rows_BSK.dtype),
            rows_BSK[..., :latent],
            precision=precision,
            preferred_element_type=kind,
        )
        some = total_BN1 > 0
        divisor = jnp.where(some, total_BN1, 1.0)
        return (value / divisor).astype(dtype), jnp.where(some, top_BN1 + jnp.log(divisor), -jnp.inf)[..., 0]

    return jax.vmap(split, in_axes=1)(first_BX, end_BX)
