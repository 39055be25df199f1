"""Attention over a cache of latents [§2.1.1]: absorbed for a few queries, expanded for many.

MLA remembers c_kv after its norm and the rotated k_rope, kv_lora_rank + qk_rope_head_dim numbers a token and layer: 576. The
other kinds, for comparison, remember their rotated keys and their values. A sequence's row i of the cache is its position i;
what lies beyond its length is never seen, and overwritten in time.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from dsv3_jax.bits import bits_dtype, from_bits, to_bits
from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.serving import joined
from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.kernels.decode.api import paged_decode_attention
from dsv3_jax.kernels.decode.work import splits_for
from dsv3_jax.kernels.modes import chosen
from dsv3_jax.kernels.tiles import LANES, SUBLANES_BF16, up
from dsv3_jax.model.attention import causal_attention
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import plain_heads
from dsv3_jax.model.rope import apply_rope, softmax_scale
from dsv3_jax.parallel.collectives import varying_like

Rope = tuple[Float[Array, "B T J"], Float[Array, "B T J"]]
SMALLEST_VIEW = 128  # rows of the cache that are looked at, at least


def cache_width(config: ModelConfig) -> int:
    """Numbers that a token's row of one layer holds."""
    if config.attention == "mla":
        return config.kv_lora_rank + config.qk_rope_head_dim
    return config.n_key_value_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)


def implementation(config: ModelConfig, platform: str | None = None) -> str:
    """Of attention over the cache; `platform`: of the devices, where there is no mesh around."""
    return chosen(config.decode_implementation, "views", platform, possible=config.attention == "mla")


def cache_shape(config: ModelConfig, batch: int, size: int, platform: str) -> tuple[int, int, int]:
    """[B, S, C] of one layer. TPUs lay rows out in whole lanes: what is as wide as that, and as tall, no kernel has to copy."""
    if not implementation(config, platform).startswith("pallas_tpu"):
        return batch, size, cache_width(config)
    return batch, up(size, SUBLANES_BF16), up(cache_width(config), LANES)


def cache_dtype(config: ModelConfig, platform: str) -> jnp.dtype:
    """The compute dtype; on CPU, where narrow floats are slow to move (`to_bits`), integers of the same bits."""
    dtype = jnp.dtype(config.compute_dtype)
    return bits_dtype(dtype) if platform == "cpu" else dtype


def views(size: int) -> list[int]:
    """How many rows of a cache of `size` a step may look at: its cost follows the length in steps of a third to a half."""
    steps = [SMALLEST_VIEW]
    while steps[-1] < size:
        steps += [steps[-1] * 3 // 2, steps[-1] * 2]
    return [*(s for s in steps if s < size), size]


def cached_attention(
    params: Mapping[str, Any],
    x_BTD: Float[Array, "B T D"],
    rows: Shaped[Array, "*layers B S C"],
    start_B: Int[Array, " B"],
    rope: Rope,
    config: ModelConfig,
    *,
    absorbed: bool,
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], Shaped[Array, "*layers B S C"]]:
    """T tokens of each sequence, from position `start` on, see themselves and what the cache has before them.

    Returns what attention adds (of the heads that `params` have: on one of several tensor ranks a part of the sum), and the
    cache with their rows written. `absorbed` multiplies queries into the latent's space
    and never makes a key; without it keys and values of all heads are expanded. MLA only; the others do the same in both cases.
    `layer`: which one of a stack's caches it is, where `rows` are a stack's.
    """
    q_BHTK, new_BTC = (_mla_query_and_row if config.attention == "mla" else _plain_query_and_row)(params, x_BTD, rope, config)
    rows = written(rows, new_BTC, start_B, layer)
    if absorbed and (how := implementation(config)) != "views":
        return _projected(params, _kernel(params, q_BHTK, rows, start_B, layer, config, how), x_BTD.dtype), rows
    # Copied: XLA on TPUs would copy the whole stack for branches that slice it themselves.
    own_BSC = rows if layer is None else lax.dynamic_index_in_dim(rows, layer, keepdims=False)
    kinds = {"mla": _absorbed if absorbed else _expanded}
    attend = partial(kinds.get(config.attention, _plain), params, config=config)
    length, sizes = x_BTD.shape[1], views(rows.shape[-2])

    def over(size: int) -> Callable[[], Array]:
        def view() -> Array:
            return attend(q_BHTK, from_bits(own_BSC[:, :size], x_BTD.dtype), visible_BTS(start_B, length, size))

        return view

    branches, needed = [over(size) for size in sizes], start_B.max() + length
    which = jnp.searchsorted(jnp.array(sizes, jnp.int32), needed.astype(jnp.int32)).astype(jnp.int32)
    if not absorbed and length > 1:  # the beginning of prompts: nothing is cached before it

        def first() -> Array:
            return _first(params, q_BHTK, new_BTC, config)

        branches, which = [first, *branches], jnp.where(start_B.max() == 0, 0, which + 1)
    out_BHTW = branches[0]() if len(branches) == 1 else lax.switch(which, branches)
    return _projected(params, out_BHTW, x_BTD.dtype), rows


def _projected(params: Mapping[str, Any], out_BHTW: Array, dtype: Any) -> Array:
    return rearrange(out_BHTW, "b h t w -> b t (h w)") @ params["o_proj"].astype(dtype)


def written(rows: Array, new_BTC: Array, start_B: Array, layer: Array | None = None) -> Array:
    """`new` at positions start, start + 1, ... of each sequence; in place, where its caller lets go of `rows`."""
    if layer is None:
        return written(rows[None], new_BTC, start_B, jnp.int32(0))[0]
    if rows.dtype != new_BTC.dtype:
        new_BTC = to_bits(new_BTC)
    for b in range(new_BTC.shape[0]):  # a scatter would be one operation, but have XLA turn the whole cache over for it
        rows = lax.dynamic_update_slice(rows, new_BTC[None, b : b + 1], (layer, b, start_B[b], 0))
    return rows


def visible_BTS(start_B: Array, length: int, size: int) -> Array:
    """Which rows each query sees: those up to its own position."""
    position_BT = start_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    return jnp.arange(size, dtype=jnp.int32)[None, None, :] <= position_BT[:, :, None]


def _mla_query_and_row(params: Mapping[str, Any], x_BTD: Array, rope: Rope, config: ModelConfig) -> tuple[Array, Array]:
    """Eqs. 1, 3, 6-8: queries, content then rotated part, and what the cache holds of a token."""
    rank, latent = config.q_lora_rank, config.kv_lora_rank
    heads, nope, rope_dim = params["k_up"].shape[0], config.qk_nope_head_dim, config.qk_rope_head_dim
    if rank is None:
        both = joined(params, ("q_proj", "kv_a_proj_with_mqa"), x_BTD)
        q_BTN, c_kv, k_rope = jnp.split(both, [heads * (nope + rope_dim), both.shape[-1] - rope_dim], axis=-1)
    else:
        both = joined(params, ("q_a_proj", "kv_a_proj_with_mqa"), x_BTD)
        c_q, c_kv, k_rope = jnp.split(both, [rank, rank + latent], axis=-1)
        q_BTN = rms_norm(c_q, params["q_a_layernorm"], config.latent_norm_eps) @ params["q_b_proj"].astype(x_BTD.dtype)
    c_kv = rms_norm(c_kv, params["kv_a_layernorm"], config.latent_norm_eps)
    q_content, q_rope = jnp.split(rearrange(q_BTN, "b t (h k) -> b h t k", h=heads), [nope], axis=-1)
    q_BHTK = jnp.concatenate([q_content, apply_rope(q_rope, *rope)], axis=-1)
    return q_BHTK, jnp.concatenate([c_kv, apply_rope(k_rope[:, None], *rope)[:, 0]], axis=-1)


def _latent_queries(params: Mapping[str, Any], q_BHTK: Array, config: ModelConfig) -> Array:
    """A query in the latent's space, by K_i^T, where one key of 576 is all heads'."""
    q_latent = jnp.einsum("bhtd,hdc->bhtc", q_BHTK[..., : config.qk_nope_head_dim], params["k_up"])
    return jnp.concatenate([q_latent, q_BHTK[..., config.qk_nope_head_dim :]], axis=-1)


def _kernel(
    params: Mapping[str, Any], q_BHTK: Array, rows: Array, start_B: Array, layer: Array | None, config: ModelConfig, how: str
) -> Array:
    """A stack's caches are pages, of which a layer's are its own: nothing is sliced out."""
    (batch, heads, length, _), rank = q_BHTK.shape, config.kv_lora_rank
    q_BTHK = jnp.swapaxes(_latent_queries(params, q_BHTK, config), 1, 2)
    pages_PSC = from_bits(rows, q_BHTK.dtype).reshape(-1, *rows.shape[-2:])
    page_B = jnp.arange(batch, dtype=jnp.int32) + (0 if layer is None else layer * batch)
    z_BTHC, _ = paged_decode_attention(
        q_BTHK, pages_PSC, page_B[:, None], start_B + length, latent=rank, scale=softmax_scale(config), implementation=how,
        splits=splits_for(how, batch, length * heads, rows.shape[-2]),
    )  # fmt: skip
    return jnp.einsum("bthc,hcw->bhtw", z_BTHC, params["v_up"])


def _absorbed(params: Mapping[str, Any], q_BHTK: Array, rows_BSC: Array, visible: Array, *, config: ModelConfig) -> Array:
    """Scores of 576 channels, values of 512, the same for all heads; V_i after the sum."""
    rank, q_rows = config.kv_lora_rank, _latent_queries(params, q_BHTK, config)
    rows_BSC = rows_BSC[..., : q_rows.shape[-1]]
    batch, heads, length, _ = q_rows.shape
    # Heads and queries side by side, one product a sequence, rows first: XLA on CPU takes half the time so. The rotary channels
    # go along in the sum and are dropped after it.
    q_BCN = q_rows.reshape(batch, heads * length, -1).swapaxes(1, 2)
    scores_BSN = jnp.einsum("bsc,bcn->bsn", rows_BSC, q_BCN, preferred_element_type=jnp.float32) * softmax_scale(config)
    seen_BSN = jnp.tile(visible.swapaxes(1, 2), (1, 1, heads))
    weights_BSN = jax.nn.softmax(jnp.where(seen_BSN, scores_BSN, -jnp.inf), axis=1).astype(rows_BSC.dtype)
    z_BNC = jnp.einsum("bns,bsc->bnc", weights_BSN.swapaxes(1, 2), rows_BSC)
    z_BHTC = z_BNC.reshape(batch, heads, length, -1)[..., :rank]
    return jnp.einsum("bhtc,hcw->bhtw", z_BHTC.astype(q_BHTK.dtype), params["v_up"])


def _softmax(scores_BHTS: Array, visible_BTS: Array, config: ModelConfig) -> Array:
    scores = jnp.where(visible_BTS[:, None], scores_BHTS * softmax_scale(config), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def _content_and_values(params: Mapping[str, Any], rows_BSC: Array, config: ModelConfig) -> tuple[Array, Array]:
    c_kv = rows_BSC[..., : config.kv_lora_rank]
    return jnp.einsum("bsc,hdc->bhsd", c_kv, params["k_up"]), jnp.einsum("bsc,hcw->bhsw", c_kv, params["v_up"])


def _keys_and_values(params: Mapping[str, Any], rows_BSC: Array, config: ModelConfig) -> tuple[Array, Array]:
    """All heads' keys [B, H, S, K] and values, from rows of latents."""
    k_content, v = _content_and_values(params, rows_BSC, config)
    k_rope = rows_BSC[:, None, :, config.kv_lora_rank : cache_width(config)]
    k_rope = jnp.broadcast_to(k_rope, (*k_content.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k_content, k_rope], axis=-1), v


def _expanded(params: Mapping[str, Any], q_BHTK: Array, rows_BSC: Array, visible: Array, *, config: ModelConfig) -> Array:
    k_BHSK, v_BHSW = _keys_and_values(params, rows_BSC.astype(q_BHTK.dtype), config)
    scores = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    weights = _softmax(scores, visible, config)
    return jnp.einsum("bhts,bhsw->bhtw", weights.astype(v_BHSW.dtype), v_BHSW)


def _first(params: Mapping[str, Any], q_BHTK: Array, rows_BTC: Array, config: ModelConfig) -> Array:
    """Queries that see only each other: half of the square is not computed."""
    if config.attention != "mla":
        k, v = _plain_keys_and_values(rows_BTC, config)
    elif (how := chosen(config.attention_implementation, "blockwise")) == "blockwise":
        k, v = _keys_and_values(params, rows_BTC, config)
    else:
        nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
        k, v = _content_and_values(params, rows_BTC, config)
        operands = q_BHTK[..., :nope], q_BHTK[..., nope:], k, rows_BTC[..., rank:], v
        q, q_rope, k, k_rope, v = varying_like(operands, operands)
        return mla_attention(q, q_rope, k, k_rope, v, None, softmax_scale(config), implementation=how)
    q = rearrange(q_BHTK, "b (g q) t k -> b g q t k", g=k.shape[1])
    return rearrange(causal_attention(q, k, v, None, softmax_scale(config)), "b g q t w -> b (g q) t w")


def _plain_query_and_row(params: Mapping[str, Any], x_BTD: Array, rope: Rope, config: ModelConfig) -> tuple[Array, Array]:
    heads = plain_heads(params, x_BTD, config)
    q = jnp.concatenate([heads.q_content_BHTC, apply_rope(heads.q_rope_BHTR, *rope)], axis=-1)
    row = jnp.concatenate([heads.k_content_BGTC, apply_rope(heads.k_rope_BGTR, *rope), heads.v_BGTW], axis=-1)
    return q, rearrange(row, "b g t c -> b t (g c)")


def _plain_keys_and_values(rows_BSC: Array, config: ModelConfig) -> tuple[Array, Array]:
    apart = rearrange(rows_BSC, "b s (g c) -> b g s c", g=config.n_key_value_heads)
    k, v = jnp.split(apart, [config.qk_nope_head_dim + config.qk_rope_head_dim], axis=-1)
    return k, v


def _plain(params: Mapping[str, Any], q_BHTK: Array, rows_BSC: Array, visible: Array, *, config: ModelConfig) -> Array:
    k, v = _plain_keys_and_values(rows_BSC.astype(q_BHTK.dtype), config)
    q = rearrange(q_BHTK, "b (g q) t k -> b g q t k", g=k.shape[1])
    scores = jnp.einsum("bgqtk,bgsk->bgqts", q, k, preferred_element_type=jnp.float32)
    flat = rearrange(scores, "b g q t s -> b (g q) t s")
    weights = rearrange(_softmax(flat, visible, config), "b (g q) t s -> b g q t s", g=k.shape[1])
    return rearrange(jnp.einsum("bgqts,bgsw->bgqtw", weights.astype(v.dtype), v), "b g q t w -> b (g q) t w")
