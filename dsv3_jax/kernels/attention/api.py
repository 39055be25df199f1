"""Attention over MLA's expanded heads, eqs. 10-11 [§2.1.1]: causal, in training and prefill.

    out_t = sum_s softmax_s(scale * (q_content_t . k_content_s + q_rope_t . k_rope_s)) v_s

A score is the sum of two products, of the content parts and of the rotary parts, whose key all heads share: no key of both is
made. The softmax is float32. What the backward pass needs besides the operands is the log-sum-exp and the result, which may be
kept in FP8 [§3.3.2].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from dsv3_jax import remat
from dsv3_jax.fp8.linear import keep
from dsv3_jax.fp8.quantize import Quantised, Quantiser
from dsv3_jax.kernels.attention import pallas_gpu, pallas_tpu, pallas_tpu_backward, reference
from dsv3_jax.kernels.attention.call import Backward, Forward, Operands
from dsv3_jax.kernels.modes import Mode, mode_of


class Implementation(NamedTuple):
    forward: Forward
    backward: Backward


IMPLEMENTATIONS = {
    "reference": Implementation(reference.forward, reference.backward),
    "pallas_tpu": Implementation(pallas_tpu.forward, pallas_tpu_backward.backward),
    "pallas_gpu": Implementation(pallas_gpu.forward, pallas_gpu.backward),
}


def mla_attention(
    q_content_BHTC: Float[Array, "B H T C"],
    q_rope_BHTR: Float[Array, "B H T R"],
    k_content_BHSC: Float[Array, "B H S C"],
    k_rope_BSR: Float[Array, "B S R"],
    v_BHSW: Float[Array, "B H S W"],
    segments_BS: Int[Array, "B S"] | None,
    scale: float,
    *,
    implementation: str,
) -> Float[Array, "B H T W"]:
    """Queries are the last T of S positions; in the operands' dtype, and differentiable in the five of them.

    A query sees the keys at or before its position and, where `segments` is given, those of its own document alone: ids from
    1 on, 0 for padding. Results and gradients of padding are zero, and whatever it holds, NaN included, reaches nothing else.
    Operands are all float32 or all bfloat16. `implementation`: one of IMPLEMENTATIONS; see `kernels.modes`.
    Raises ValueError for another one, for dtypes that differ, for sides that do not fit each other, or a scale not above 0.
    """
    heads = Heads(q_content_BHTC, q_rope_BHTR, k_content_BHSC, k_rope_BSR, v_BHSW)
    return attention_and_cache(heads, segments_BS, scale, None, implementation=implementation)[0]


class Heads(NamedTuple):
    """As `mla_attention` takes them."""

    q_content_BHTC: Float[Array, "B H T C"]
    q_rope_BHTR: Float[Array, "B H T R"]
    k_content_BHSC: Float[Array, "B H S C"]
    k_rope_BSR: Float[Array, "B S R"]
    v_BHSW: Float[Array, "B H S W"]


def attention_and_cache(
    heads: Heads, segments_BS: Int[Array, "B S"] | None, scale: float, cache: Quantiser | None, *, implementation: str
) -> tuple[Float[Array, "B H T W"], Quantised | None]:
    """As `mla_attention`; its output is kept as `cache` rounds it, [B T, H W], for the projection after it as well."""
    mode = mode_of(implementation, tuple(IMPLEMENTATIONS))
    if not scale > 0:  # the largest product is then the largest score
        raise ValueError(f"scale: expected a positive number, got {scale}")
    _check(heads, segments_BS)
    if segments_BS is not None:
        segments_BS = segments_BS.astype(jnp.int32)
    return _attention(heads, segments_BS, scale, cache, mode)


def _check(heads: Heads, segments_BS: Array | None) -> None:
    q, q_rope, k, k_rope, v = heads
    for name, x in heads._asdict().items():
        if x.dtype != q.dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name}: expected q_content's dtype, float32 or bfloat16, got {x.dtype} and {q.dtype}; cast them")
    (B, H, T, C), R, (S, W) = q.shape, q_rope.shape[3], v.shape[2:]
    shapes = (B, H, T, C), (B, H, T, R), (B, H, S, C), (B, S, R), (B, H, S, W)
    for (name, x), shape in zip(heads._asdict().items(), shapes, strict=True):
        if x.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)} beside the others, got {list(x.shape)}")
    if T > S:
        raise ValueError(f"q_content_BHTC: expected at most as many queries as keys, {S}, got {T}")
    if segments_BS is not None and segments_BS.shape != (B, S):
        raise ValueError(f"segments_BS: expected {[B, S]}, an id for each key, got {list(segments_BS.shape)}")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attention(
    heads: Heads, segments_BS: Array | None, scale: float, cache: Quantiser | None, mode: Mode
) -> tuple[Array, Quantised | None]:
    return _forward(heads, segments_BS, scale, cache, mode)[0]


def _forward(
    heads: Heads, segments_BS: Array | None, scale: float, cache: Quantiser | None, mode: Mode
) -> tuple[tuple[Array, Quantised | None], Any]:
    q, v = heads.q_content_BHTC, heads.v_BHSW
    if 0 in (*q.shape[:3], v.shape[3]):
        out, lse_BHT = jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype), jnp.zeros(q.shape[:3])
    else:
        run = IMPLEMENTATIONS[mode.implementation].forward
        out, lse_BHT = run(_operands(heads, segments_BS, scale), interpret=mode.interpret)
    lse_BHT = remat.name(lse_BHT, remat.ATTENTION)
    if cache is None:
        out = remat.name(out, remat.ATTENTION)
        return (out, None), (heads, segments_BS, out, lse_BHT)
    kept = remat.name(keep(rearrange(out, "b h t w -> (b t) (h w)"), cache), remat.ATTENTION)
    return (out, kept), (heads, segments_BS, kept, lse_BHT)


def _backward(scale: float, cache: Quantiser | None, mode: Mode, saved: Any, d_outputs: tuple[Array, Any]) -> Any:
    (heads, segments_BS, out, lse_BHT), d_out = saved, d_outputs[0]
    if 0 in d_out.shape:
        return Heads(*(jnp.zeros_like(x) for x in heads)), None
    if cache is not None:
        out = rearrange(out.astype(jnp.float32), "(b t) (h w) -> b h t w", **dict(zip("bhtw", d_out.shape, strict=True)))
    if segments_BS is not None:
        d_out = _without_padding(d_out, segments_BS[:, -d_out.shape[2] :])
    delta_BHT = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    run = IMPLEMENTATIONS[mode.implementation].backward
    return Heads(*run(_operands(heads, segments_BS, scale), lse_BHT, delta_BHT, d_out, interpret=mode.interpret)), None


_attention.defvjp(_forward, _backward)


def _operands(heads: Heads, segments_BS: Array | None, scale: float) -> Operands:
    """With zeros for padding: its weights are zero, but sums over it would still hold 0 * NaN."""
    q, q_rope, k, k_rope, v = heads
    if segments_BS is not None:
        of_queries = segments_BS[:, -q.shape[2] :]
        q, q_rope = (_without_padding(x, of_queries) for x in (q, q_rope))
        k, k_rope, v = (_without_padding(x, segments_BS) for x in (k, k_rope, v))
    return Operands(q, q_rope, k, k_rope, v, segments_BS, scale)


def _without_padding(x: Array, segments: Array) -> Array:
    real = (segments != 0)[..., None]
    return jnp.where(real if x.ndim == 3 else real[:, None], x, jnp.zeros((), x.dtype))
