"""Attention of a few new tokens over a cache of latents: MLA's decoding, absorbed [§2.1.1].

    out, lse = decode_attention(q, cache, length, ...)                a sequence's rows one after the other
    out, lse = paged_decode_attention(q, pages, table, length, ...)   a sequence's rows in pages

Queries are in the latent's space already, K = C + R numbers a head: K_i^T q_i, then the rotated part. One cache serves all
heads: a row (c_kv, k_rope) is the key, its first C = `latent` numbers are the value. Scores and their statistics are float32.

`length_B` counts the rows written so far, the T new ones included: query t sees the first length - T + t + 1 rows, at least
none and at most all there are; where it sees none, the result is zeros and its log-sum-exp -inf. So a device with rows from
position p on passes length - p, and `combine` makes one result of the devices'. Rows that are not seen may hold anything, NaN
included. Rows of the cache may be wider than K: what follows is not used. TPUs want 640 for 576, as XLA lays out rows of
another width than whole lanes so that a kernel has to copy the whole cache.

No gradients.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.decode import pallas_gpu, pallas_tpu, reference
from dsv3_jax.kernels.decode.call import Attend
from dsv3_jax.kernels.decode.combine import combine
from dsv3_jax.kernels.modes import mode_of

IMPLEMENTATIONS: dict[str, Attend] = {
    "reference": reference.attend,
    "pallas_tpu": pallas_tpu.attend,
    "pallas_gpu": pallas_gpu.attend,
}


def decode_attention(
    q_BTHK: Float[Array, "B T H K"],
    cache_BSW: Float[Array, "B S W"],
    length_B: Int[Array, " B"],
    *,
    latent: int,
    scale: float,
    implementation: str,
    splits: int = 1,
    dtype: Any = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """The result, in q's dtype unless `dtype` names another, and the log-sum-exp of the scaled scores, float32.

    q and cache are both float32 or both bfloat16. `splits`: parts of a sequence that are computed apart and then combined; more
    than one occupies a chip when there are few sequences, at the price of parts that go through its memory in float32.
    `implementation`: one of IMPLEMENTATIONS; see `kernels.modes`.
    On TPU, S should be a multiple of 16: else the whole cache is copied.
    Raises ValueError for another implementation, for dtypes that differ, and for sides that do not fit each other.
    """
    if cache_BSW.shape[0] != q_BTHK.shape[0]:
        raise ValueError(f"cache_BSW: expected {q_BTHK.shape[0]} sequences, as q has, got {cache_BSW.shape[0]}")
    table_BM = jnp.arange(cache_BSW.shape[0], dtype=jnp.int32)[:, None]  # a sequence is one page
    return _attention(q_BTHK, cache_BSW, table_BM, length_B, latent, scale, implementation, splits, dtype, "decode")


def paged_decode_attention(
    q_BTHK: Float[Array, "B T H K"],
    cache_PSW: Float[Array, "P S W"],
    table_BM: Int[Array, "B M"],
    length_B: Int[Array, " B"],
    *,
    latent: int,
    scale: float,
    implementation: str,
    splits: int = 1,
    dtype: Any = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """As `decode_attention`, of sequences whose rows are in M pages at most, of P that there are, of S rows.

    `table_BM`: a sequence's pages in order; entries behind its length are never used.
    On TPU, S must be a multiple of 16.
    """
    if table_BM.shape[0] != q_BTHK.shape[0]:
        raise ValueError(f"table_BM: expected {q_BTHK.shape[0]} sequences, as q has, got {table_BM.shape[0]}")
    return _attention(q_BTHK, cache_PSW, table_BM, length_B, latent, scale, implementation, splits, dtype, "decode_paged")


def _attention(
    q_BTHK: Array,
    cache_PSW: Array,
    table_BM: Array,
    length_B: Array,
    latent: int,
    scale: float,
    implementation: str,
    splits: int,
    dtype: Any,
    name: str,
) -> tuple[Array, Array]:
    mode = mode_of(implementation, tuple(IMPLEMENTATIONS))
    batch, queries, heads, width = q_BTHK.shape
    if cache_PSW.dtype != q_BTHK.dtype or q_BTHK.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"cache: expected q's dtype, float32 or bfloat16, got {cache_PSW.dtype} and q {q_BTHK.dtype}; cast the queries"
        )
    if cache_PSW.shape[2] < width:
        raise ValueError(f"cache: expected rows of at least {width} numbers, as q has, got {cache_PSW.shape[2]}")
    if not 0 < latent <= width:
        raise ValueError(f"latent: expected 1 to {width}, the numbers of a row that are its value, got {latent}")
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    if length_B.shape != (batch,):
        raise ValueError(f"length_B: expected [{batch}], a length a sequence, got {list(length_B.shape)}")
    dtype = dtype or q_BTHK.dtype
    if not q_BTHK.size or not table_BM.size or not cache_PSW.size:
        shape = (batch, queries, heads)
        return jnp.zeros((*shape, latent), dtype), jnp.full(shape, -jnp.inf, jnp.float32)
    part, lse = IMPLEMENTATIONS[mode.implementation](
        q_BTHK.reshape(batch, queries * heads, width), cache_PSW, table_BM.astype(jnp.int32), length_B.astype(jnp.int32),
        heads=heads, latent=latent, scale=scale, splits=splits, dtype=dtype if splits == 1 else jnp.float32,
        name=name, interpret=mode.interpret,
    )  # fmt: skip
    part, lse = part.reshape(splits, batch, queries, heads, latent), lse.reshape(splits, batch, queries, heads)
    if splits == 1:
        return part[0], lse[0]
    out, lse_BTH = combine(part, lse)
    return out.astype(dtype), lse_BTH
