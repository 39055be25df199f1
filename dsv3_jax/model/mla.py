"""Multi-head latent attention, eqs. 1-11 [§2.1.1], and MHA, GQA and MQA of the same head shapes beside it.

Every variant projects to the same five arrays, content and rotary parts apart, and shares what follows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from dsv3_jax import remat
from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.precision import attention_cache, products
from dsv3_jax.fp8.quantize import Quantised, Quantiser
from dsv3_jax.kernels.attention import api as kernel
from dsv3_jax.kernels.modes import chosen, platform
from dsv3_jax.model.attention import attention_and_cache
from dsv3_jax.model.layers import linear, rms_norm
from dsv3_jax.model.rope import apply_rope, softmax_scale
from dsv3_jax.model.spec import Spec, SpecTree, gain
from dsv3_jax.parallel.collectives import varying_like


class Heads(NamedTuple):
    """Queries, keys and values, heads before positions; C content, R rotary, W value channels of a head.

    Keys and values may have fewer heads than queries (GQA, MQA), and MLA's rotary key has one.
    """

    q_content_BHTC: Array
    q_rope_BHTR: Array
    k_content_BGTC: Array
    k_rope_BGTR: Array
    v_BGTW: Array


def attention_spec(config: ModelConfig) -> SpecTree:
    """Parameters of one attention, named as in released checkpoints."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.n_key_value_heads
    qk, v = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    o_proj = {"o_proj": Spec((heads, v, hidden), ("heads", "head_dim", "embed"))}
    if config.attention != "mla":
        return {
            "q_proj": Spec((hidden, heads, qk), ("embed", "heads", "head_dim")),
            "k_proj": Spec((hidden, kv_heads, qk), ("embed", "kv_heads", "head_dim")),
            "v_proj": Spec((hidden, kv_heads, v), ("embed", "kv_heads", "head_dim")),
        } | o_proj
    rank, latent = config.q_lora_rank, config.kv_lora_rank
    query: SpecTree
    if rank is None:
        query = {"q_proj": Spec((hidden, heads, qk), ("embed", "heads", "head_dim"))}
    else:
        query = {
            "q_a_proj": Spec((hidden, rank), ("embed", "q_lora")),
            "q_a_layernorm": gain(rank, "q_lora"),
            "q_b_proj": Spec((rank, heads, qk), ("q_lora", "heads", "head_dim")),
        }
    return {
        **query,
        "kv_a_proj_with_mqa": Spec((hidden, latent + config.qk_rope_head_dim), ("embed", "kv_lora")),
        "kv_a_layernorm": gain(latent, "kv_lora"),
        "kv_b_proj": Spec((latent, heads, config.qk_nope_head_dim + v), ("kv_lora", "heads", "head_dim")),
        **o_proj,
    }


def mla_heads(params: Mapping[str, Any], x_BTD: Float[Array, "B T D"], config: ModelConfig) -> Heads:
    """Eqs. 1-9: compress to latents, normalise them, expand per head; k_rope bypasses the latent and its norm."""

    def down(name: str) -> Array:
        return remat.name(linear(params, name, x_BTD, config), remat.LATENT)

    def up(latent_BTC: Array, name: str) -> Array:
        return _heads(params, name, latent_BTC, config)

    if config.q_lora_rank is None:
        q = up(x_BTD, "q_proj")
    else:
        q = up(rms_norm(down("q_a_proj"), params["q_a_layernorm"], config.latent_norm_eps), "q_b_proj")
    c_kv_BTC, k_rope_BTR = jnp.split(down("kv_a_proj_with_mqa"), [config.kv_lora_rank], axis=-1)
    kv = up(rms_norm(c_kv_BTC, params["kv_a_layernorm"], config.latent_norm_eps), "kv_b_proj")
    q_content, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    k_content, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    return Heads(q_content, q_rope, k_content, k_rope_BTR[:, None], v)


def _heads(params: Mapping[str, Any], name: str, x_BTC: Array, config: ModelConfig) -> Array:
    """Projected to heads: [B, H, T, channels of a head]."""
    if products(config, name) is None:
        return jnp.einsum("btc,chd->bhtd", x_BTC, params[name].astype(x_BTC.dtype))
    return rearrange(linear(params, name, x_BTC, config), "b t (h d) -> b h t d", h=params[name].shape[1])


def plain_heads(params: Mapping[str, Any], x_BTD: Array, config: ModelConfig) -> Heads:
    """MHA, GQA and MQA: full projections; rotation on the last qk_rope_head_dim channels of each head."""
    q, k, v = (_heads(params, name, x_BTD, config) for name in ("q_proj", "k_proj", "v_proj"))
    q_content, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    k_content, k_rope = jnp.split(k, [config.qk_nope_head_dim], axis=-1)
    return Heads(q_content, q_rope, k_content, k_rope, v)


def attention(
    params: Mapping[str, Any],
    x_BTD: Float[Array, "B T D"],
    rope: tuple[Float[Array, "B T J"], Float[Array, "B T J"]],
    segments_BT: Int[Array, "B T"] | None,
    config: ModelConfig,
) -> Float[Array, "B T D"]:
    """One causal attention of the configured kind; `rope` from `rope_tables`, `segments` to keep documents apart.

    The heads are those of `params`: all of them or, on one of several tensor ranks, some; then the result is a part of a sum.
    """
    project = mla_heads if config.attention == "mla" else plain_heads
    heads = project(params, x_BTD, config)
    q_rope, k_rope = apply_rope(heads.q_rope_BHTR, *rope), apply_rope(heads.k_rope_BGTR, *rope)
    heads = heads._replace(q_rope_BHTR=q_rope, k_rope_BGTR=k_rope)
    fp8 = products(config, "o_proj") is not None
    out_BHTW, kept = _core(heads, segments_BT, config, attention_cache(config) if fp8 else None)
    if fp8:
        return linear(params, "o_proj", rearrange(out_BHTW, "b h t w -> b t (h w)"), config, kept)
    return jnp.einsum("bhtw,hwd->btd", out_BHTW, params["o_proj"].astype(x_BTD.dtype))


GPU_WIDTHS = 128 + 64 + 128  # of V3's heads, for which blocks on GPUs are chosen; each a power of two there


def core_implementation(config: ModelConfig, on: str | None = None) -> str:
    """What computes eqs. 10-11; `on`: another platform than that of the device around."""
    widths = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
    fits = (on or platform()) != "gpu" or sum(1 << (width - 1).bit_length() for width in widths) <= GPU_WIDTHS
    return chosen(config.attention_implementation, "blockwise", on, possible=config.attention == "mla" and fits)


def _core(
    heads: Heads, segments_BT: Int[Array, "B T"] | None, config: ModelConfig, cache: Quantiser | None
) -> tuple[Float[Array, "B H T W"], Quantised | None]:
    """Eqs. 10-11 of rotated heads; and the output as `cache` rounds it, for the backward pass and for the projection after."""
    q, q_rope, k, k_rope, v = heads
    how = core_implementation(config)
    if how == "blockwise":
        k_rope = jnp.broadcast_to(k_rope, (*k.shape[:3], k_rope.shape[-1]))
        q_BHTK, k_BGTK = jnp.concatenate([q, q_rope], axis=-1), jnp.concatenate([k, k_rope], axis=-1)
        q_BGQTK = rearrange(q_BHTK, "b (g q) t k -> b g q t k", g=v.shape[1])
        out_BGQTW, kept = attention_and_cache(q_BGQTK, k_BGTK, v, segments_BT, softmax_scale(config), cache)
        return rearrange(out_BGQTW, "b g q t w -> b (g q) t w"), kept
    operands = kernel.Heads(q, q_rope, k, k_rope[:, 0], v)
    operands, segments_BT = varying_like(operands, (operands, segments_BT))
    return kernel.attention_and_cache(operands, segments_BT, softmax_scale(config), cache, implementation=how)
