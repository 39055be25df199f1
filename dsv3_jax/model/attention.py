"""Causal attention over expanded heads, eqs. 10-11 [§2.1.1]: softmax in float32, a block of queries at a time.

No array of [queries, keys] outlives its block, and a block reads only the keys up to its last query. The backward pass
recomputes a block's scores from the saved log-sum-exp instead of keeping its weights.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from dsv3_jax import remat
from dsv3_jax.fp8.linear import keep
from dsv3_jax.fp8.quantize import Quantised, Quantiser
from dsv3_jax.parallel.collectives import varying_like

# A block costs code, its keys beyond the diagonal cost work: (n + 1) / 2n of the full square for n blocks.
MAX_BLOCKS, MIN_BLOCK = 8, 64


def causal_attention(
    q_BGQTC: Float[Array, "B G Q T C"],
    k_BGSC: Float[Array, "B G T C"],
    v_BGSW: Float[Array, "B G T W"],
    segments_BT: Int[Array, "B T"] | None,
    scale: float,
) -> Float[Array, "B G Q T W"]:
    """softmax(scale * q k^T) v for G key/value heads, each shared by Q query heads; returns v's dtype.

    A query sees the keys at or before its position, of its own segment where `segments` is given.
    """
    return _attention(q_BGQTC, k_BGSC, v_BGSW, segments_BT, scale, None)[0]


def attention_and_cache(
    q_BGQTC: Float[Array, "B G Q T C"],
    k_BGSC: Float[Array, "B G T C"],
    v_BGSW: Float[Array, "B G T W"],
    segments_BT: Int[Array, "B T"] | None,
    scale: float,
    cache: Quantiser | None,
) -> tuple[Float[Array, "B G Q T W"], Quantised | None]:
    """As `causal_attention`; its output is kept as `cache` rounds it, [B T, G Q W], for the projection after it as well."""
    return _attention(q_BGQTC, k_BGSC, v_BGSW, segments_BT, scale, cache)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q: Array, k: Array, v: Array, segments_BT: Array | None, scale: float, cache: Quantiser | None
) -> tuple[Array, Quantised | None]:
    return _forward(q, k, v, segments_BT, scale, cache)[0]


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q_: Array, k: Array, segments_BT: Array | None, scale: float, start: int, stop: int) -> Array:
    """Masked scores of queries start..stop, which are `q_`, against keys 0..stop, float32 [B, G, Q, t, s]."""
    # Through a barrier with q, on which a mask then depends: JAX would take it out of the scan over layers otherwise, and keep
    # it, as large as the scores, for the whole step.
    constants = varying_like([q_], (jnp.float32(-jnp.inf), jnp.arange(stop, dtype=jnp.int32)))
    q_, (never, index) = jax.lax.optimization_barrier((q_, constants))
    scores = scale * jnp.einsum("bgqtc,bgsc->bgqts", q_, k[:, :, :stop], preferred_element_type=jnp.float32)
    visible = (index[None, :] <= index[start:stop, None])[None]
    if segments_BT is not None:
        visible = visible & (segments_BT[:, start:stop, None] == segments_BT[:, None, :stop])
    return jnp.where(visible[:, None, None], scores, never)


def _forward(
    q: Array, k: Array, v: Array, segments_BT: Array | None, scale: float, cache: Quantiser | None
) -> tuple[tuple[Array, Quantised | None], Any]:
    outs: list[Array] = []
    lses: list[Array] = []
    for start, stop in _blocks(q.shape[3]):
        q_ = q[:, :, :, start:stop]
        if outs:  # One block after the other: XLA on TPUs would start all of them, and hold the scores of the whole square.
            q_, outs[-1], lses[-1] = jax.lax.optimization_barrier((q_, outs[-1], lses[-1]))
        scores = _scores(q_, k, segments_BT, scale, start, stop)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bgqts,bgsw->bgqtw", weights.astype(v.dtype), v[:, :, :stop], preferred_element_type=jnp.float32)
        outs.append((out / total).astype(v.dtype))
        lses.append(peak + jnp.log(total))
    out, lse = jnp.concatenate(outs, axis=3), remat.name(jnp.concatenate(lses, axis=3), remat.ATTENTION)
    if cache is None:
        out = remat.name(out, remat.ATTENTION)
        return (out, None), (q, k, v, segments_BT, out, lse)
    kept = remat.name(keep(rearrange(out, "b g q t w -> (b t) (g q w)"), cache), remat.ATTENTION)
    return (out, kept), (q, k, v, segments_BT, kept, lse)


def _backward(
    scale: float, cache: Quantiser | None, saved: Any, d_outputs: tuple[Array, Any]
) -> tuple[Array, Array, Array, None]:
    (q, k, v, segments_BT, out, lse), d_out = saved, d_outputs[0]
    if cache is not None:
        sizes = dict(zip("bgqtw", d_out.shape, strict=True))
        out = rearrange(out.astype(jnp.float32), "(b t) (g q w) -> b g q t w", **sizes)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_q: list[Array] = []
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _blocks(q.shape[3]):
        q_, d_out_, lse_, delta_ = (a[:, :, :, start:stop] for a in (q, d_out, lse, delta))
        if d_q:
            q_, d_out_, d_k, d_v = jax.lax.optimization_barrier((q_, d_out_, d_k, d_v))  # in turn, as above
        weights = jnp.exp(_scores(q_, k, segments_BT, scale, start, stop) - lse_)
        d_weights = jnp.einsum("bgqtw,bgsw->bgqts", d_out_, v[:, :, :stop], preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - delta_) * scale).astype(q.dtype)
        d_q.append(jnp.einsum("bgqts,bgsc->bgqtc", d_scores, k[:, :, :stop]))
        d_v = d_v.at[:, :, :stop].add(_over_queries(weights.astype(v.dtype), d_out_))
        d_k = d_k.at[:, :, :stop].add(_over_queries(d_scores, q_))
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _over_queries(square: Array, narrow: Array) -> Array:
    """[B, G, Q, t, s] and [B, G, Q, t, x] -> float32 [B, G, s, x]."""
    if square.dtype == jnp.float32:
        # The narrow operand first, so that it and the result are what gets transposed, not [t, s].
        return jnp.swapaxes(jnp.einsum("bgqtx,bgqts->bgxs", narrow, square), 2, 3)
    # XLA's CPU backend has no BF16 product whose float32 result is transposed.
    return jnp.einsum("bgqts,bgqtx->bgsx", square, narrow, preferred_element_type=jnp.float32)


_attention.defvjp(_forward, _backward)
