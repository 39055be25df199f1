"""Cross entropy over the vocabulary without ever holding the logits of all positions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.collectives import varying_like


def chunk_length(batch: int, length: int, vocab: int, max_elements: int) -> int:
    """Positions of a sequence whose logits are alive at a time: within `max_elements`, and at most a quarter of all."""
    return max(1, min(max_elements // (batch * vocab), -(-length // 4)))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    chunk: int,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """sum(weights * nll) and nll [B, T], float32 nats, of softmax(hidden @ head^T), `chunk` positions at a time.

    Differentiable in `hidden` and `head`, through the sum alone; nll is for reports. Under differentiation each chunk's
    share of both gradients is computed while its logits are at hand, so that they are never formed twice. Inside shard_map,
    `vocab_axis` is the mesh axis that divides the head's rows.
    """

    def one_chunk(total: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, targets, weights = xs
        _, _, nll_BC = _chunk_nll(hidden, head_VD, targets, vocab_axis)
        return total + (weights * nll_BC).sum(), nll_BC

    chunks = _chunks(chunk, hidden_BTD, targets_BT, weights_BT)
    total, nll = jax.lax.scan(one_chunk, varying_like(chunks, jnp.float32(0)), chunks)
    return total, _whole(nll, hidden_BTD)


def _forward(
    hidden_BTD: Array, head_VD: Array, targets_BT: Array, weights_BT: Array, chunk: int, vocab_axis: str | None
) -> tuple[Any, Any]:
    def one_chunk(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        (total, d_head), (hidden, targets, weights) = carry, xs
        log_p_BCV, is_target_BCV, nll_BC = _chunk_nll(hidden, head_VD, targets, vocab_axis)
        d_logits = (jnp.exp(log_p_BCV) - is_target_BCV.astype(jnp.float32)) * weights[:, :, None]
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = _over(vocab_axis, jax.lax.psum, jnp.einsum("bcv,vd->bcd", d_logits, head_VD))
        d_head = d_head + jnp.einsum("bcv,bcd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return (total + (weights * nll_BC).sum(), d_head), (nll_BC, d_hidden)

    chunks = _chunks(chunk, hidden_BTD, targets_BT, weights_BT)
    start = varying_like(chunks, jnp.float32(0)), varying_like((chunks, head_VD), jnp.zeros(head_VD.shape, jnp.float32))
    (total, d_head), (nll, d_hidden) = jax.lax.scan(one_chunk, start, chunks)
    d_head = jax.lax.optimization_barrier(d_head.astype(head_VD.dtype))  # narrow now, not when XLA comes to use it
    return (total, _whole(nll, hidden_BTD)), (_whole(d_hidden, hidden_BTD), d_head)


def _backward(
    chunk: int, vocab_axis: str | None, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    d_hidden, d_head = gradients
    scale = cotangents[0]
    return d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _chunk_nll(hidden_BCD: Array, head_VD: Array, targets_BC: Array, vocab_axis: str | None) -> tuple[Array, Array, Array]:
    """log-probabilities [B, C, V] of the head's rows that are here, which of them is the target, and its nll [B, C]."""
    logits_BCV = jnp.einsum("bcd,vd->bcv", hidden_BCD, head_VD, preferred_element_type=jnp.float32)
    vocabulary = jnp.arange(head_VD.shape[0], dtype=targets_BC.dtype)
    if vocab_axis is not None:
        vocabulary += jax.lax.axis_index(vocab_axis) * head_VD.shape[0]
    shifted_BCV = logits_BCV - _over(vocab_axis, jax.lax.pmax, logits_BCV.max(axis=-1))[:, :, None]
    total_BC = _over(vocab_axis, jax.lax.psum, jnp.exp(shifted_BCV).sum(axis=-1))
    log_p_BCV = shifted_BCV - jnp.log(total_BC)[:, :, None]
    is_target_BCV = targets_BC[:, :, None] == vocabulary[None, None, :]
    nll_BC = _over(vocab_axis, jax.lax.psum, -jnp.where(is_target_BCV, log_p_BCV, 0.0).sum(axis=-1))
    return log_p_BCV, is_target_BCV, nll_BC


def _over(axis: str | None, combine: Callable[[Array, str], Array], partial_: Array) -> Array:
    return partial_ if axis is None else combine(partial_, axis)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [chunks, B, chunk, ...], the tail padded with zeros (weight 0)."""

    def cut(array: Array) -> Array:
        padding = -array.shape[1] % chunk
        padded = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        return rearrange(padded, "b (n c) ... -> n b c ...", c=chunk)

    return tuple(cut(array) for array in arrays)


def _whole(chunks: Array, like_BTD: Array) -> Array:
    return rearrange(chunks, "n b c ... -> b (n c) ...")[:, : like_BTD.shape[1]]
