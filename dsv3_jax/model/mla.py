"""Multi-head latent attention, eqs. 1-11 [§2.1.1], and MHA, GQA and MQA of the same head shapes beside it.

Every variant projects to the same five arrays, content and rotary parts apart, and shares one attention core.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import MLA_UP, rms_norm
from dsv3_jax.model.rope import apply_rope, softmax_scale
from dsv3_jax.model.spec import Spec, SpecTree, gain


class Heads(NamedTuple):
    """Queries, keys and values before rotation; C content, R rotary, W value channels of a head.

    A key or value may have fewer heads than the queries (GQA, MQA; MLA's k_rope has one).
    """

    q_content_BTHC: Array
    q_rope_BTHR: Array
    k_content_BTHC: Array
    k_rope_BTHR: Array
    v_BTHW: Array


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


def _mla_heads(params: Mapping[str, Array], x_BTD: Array, config: ModelConfig) -> Heads:
    """Eqs. 1-9: compress to latents, normalise them, expand per head; k_rope bypasses the latent and its norm."""

    def up(latent_BTC: Array, name: str) -> Array:
        expanded = jnp.einsum("btc,chd->bthd", latent_BTC, params[name].astype(x_BTD.dtype))
        return checkpoint_name(expanded, MLA_UP)

    if config.q_lora_rank is None:
        q_BTHQ = up(x_BTD, "q_proj")
    else:
        c_q_BTC = x_BTD @ params["q_a_proj"].astype(x_BTD.dtype)
        q_BTHQ = up(rms_norm(c_q_BTC, params["q_a_layernorm"], config.latent_norm_eps), "q_b_proj")
    compressed = x_BTD @ params["kv_a_proj_with_mqa"].astype(x_BTD.dtype)
    c_kv_BTC, k_rope_BTR = jnp.split(compressed, [config.kv_lora_rank], axis=-1)
    kv_BTHK = up(rms_norm(c_kv_BTC, params["kv_a_layernorm"], config.latent_norm_eps), "kv_b_proj")
    q_content, q_rope = jnp.split(q_BTHQ, [config.qk_nope_head_dim], axis=-1)
    k_content, v = jnp.split(kv_BTHK, [config.qk_nope_head_dim], axis=-1)
    return Heads(q_content, q_rope, k_content, k_rope_BTR[:, :, None, :], v)


def _plain_heads(params: Mapping[str, Array], x_BTD: Array, config: ModelConfig) -> Heads:
    """MHA, GQA and MQA: full projections; rotation on the last qk_rope_head_dim channels of each head."""
    q, k, v = (jnp.einsum("btd,dhc->bthc", x_BTD, params[n].astype(x_BTD.dtype)) for n in ("q_proj", "k_proj", "v_proj"))
    q_content, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    k_content, k_rope = jnp.split(k, [config.qk_nope_head_dim], axis=-1)
    return Heads(q_content, q_rope, k_content, k_rope, v)


def attention_core(heads: Heads, mask_BTS: Bool[Array, "B T S"], scale: float) -> Float[Array, "B T H W"]:
    """Eqs. 10-11: softmax in float32 over the keys that `mask` allows; key/value heads are shared by groups of queries."""

    def grouped(queries_BTHC: Array, keys_BSHC: Array) -> Array:
        """Scores [B, kv heads, queries per kv head, T, S] in float32."""
        batch, length, n_heads, channels = queries_BTHC.shape
        queries = queries_BTHC.reshape(batch, length, keys_BSHC.shape[2], -1, channels)
        return jnp.einsum("btgqc,bsgc->bgqts", queries, keys_BSHC, preferred_element_type=jnp.float32)

    n_heads = heads.q_content_BTHC.shape[2]
    batch, length, v_heads, _ = heads.v_BTHW.shape

    def per_head(scores: Array) -> Array:
        return scores.reshape(batch, n_heads, length, length)

    scores_BHTS = per_head(grouped(heads.q_content_BTHC, heads.k_content_BTHC)) + per_head(
        grouped(heads.q_rope_BTHR, heads.k_rope_BTHR)
    )
    weights_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, :, :], scores_BHTS * scale, -jnp.inf), axis=-1)
    weights = weights_BHTS.astype(heads.v_BTHW.dtype).reshape(batch, v_heads, -1, length, length)
    out = jnp.einsum("bgqts,bsgw->btgqw", weights, heads.v_BTHW)
    return out.reshape(batch, length, n_heads, -1)


def attention(
    params: Mapping[str, Array],
    x_BTD: Float[Array, "B T D"],
    rope: tuple[Float[Array, "B T J"], Float[Array, "B T J"]],
    mask_BTS: Bool[Array, "B T S"],
    config: ModelConfig,
) -> Float[Array, "B T D"]:
    """One attention of the configured kind; `rope` from `rope_tables`, every row of `mask` allows at least one key."""
    project = _mla_heads if config.attention == "mla" else _plain_heads
    heads = project(params, x_BTD, config)
    heads = heads._replace(q_rope_BTHR=apply_rope(heads.q_rope_BTHR, *rope), k_rope_BTHR=apply_rope(heads.k_rope_BTHR, *rope))
    out_BTHW = attention_core(heads, mask_BTS, softmax_scale(config))
    return jnp.einsum("bthw,hwd->btd", out_BTHW, params["o_proj"].astype(x_BTD.dtype))
