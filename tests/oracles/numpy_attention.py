"""Attention in NumPy float64: rotary embedding with YaRN, MLA written out in full, and standard attention.

Clear rather than fast: one sequence, one head at a time.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from oracles.numpy_layers import linear, rms_norm, softmax

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]
LATENT_EPS = 1e-6  # both latent norms, whatever rms_norm_eps says


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(config: Config) -> np.ndarray:
    """Radians per position of each rotary pair, [d_r / 2]; interpolated by YaRN where `rope_scaling` is given."""
    dim, theta = config["qk_rope_head_dim"], config["rope_theta"]
    plain = np.array([theta ** (-2.0 * j / dim) for j in range(dim // 2)], np.float64)
    yarn = config.get("rope_scaling")
    if yarn is None:
        return plain

    def pair_that_turns(rotations: float) -> float:
        """The (fractional) pair that makes this many rotations over the original window."""
        window = yarn["original_max_position_embeddings"]
        return dim * math.log(window / (rotations * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high: float = min(math.ceil(pair_that_turns(yarn["beta_slow"])), dim - 1)
    if low == high:
        high += 0.001
    interpolated = [min(max((j - low) / (high - low), 0.0), 1.0) for j in range(dim // 2)]
    return np.array([w * ((1.0 - g) + g / yarn["factor"]) for w, g in zip(plain, interpolated, strict=True)])


def rope_multiplier(config: Config) -> float:
    """What cos and sin are multiplied by: 1 unless YaRN's two mscales differ."""
    yarn = config.get("rope_scaling")
    if yarn is None:
        return 1.0
    return _mscale(yarn["factor"], yarn.get("mscale", 1.0)) / _mscale(yarn["factor"], yarn.get("mscale_all_dim", 0.0))


def softmax_scale(config: Config) -> float:
    """(d_n + d_r)^-1/2, times mscale squared under YaRN."""
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    yarn = config.get("rope_scaling")
    if yarn is None:
        return scale
    return scale * _mscale(yarn["factor"], yarn.get("mscale_all_dim", 0.0)) ** 2


def rotate(
    x: np.ndarray, positions_T: np.ndarray | Sequence[int], frequencies: np.ndarray, multiplier: float = 1.0
) -> np.ndarray:
    """Rotate the pairs (x[2j], x[2j+1]) of x [T, d_r] by positions * frequencies[j]: the released, interleaved order."""
    rotated = np.empty_like(x)
    for t, position in enumerate(positions_T):
        for j, frequency in enumerate(frequencies):
            cos, sin = math.cos(position * frequency) * multiplier, math.sin(position * frequency) * multiplier
            even, odd = x[t, 2 * j], x[t, 2 * j + 1]
            rotated[t, 2 * j] = even * cos - odd * sin
            rotated[t, 2 * j + 1] = even * sin + odd * cos
    return rotated


def attention_mask(length: int, segment_ids_T: np.ndarray | None = None) -> np.ndarray:
    """[T, T] bool, row = query: earlier or same position and, where segments are given, the same segment."""
    mask = np.zeros((length, length), bool)
    for query in range(length):
        for key in range(query + 1):
            mask[query, key] = segment_ids_T is None or segment_ids_T[query] == segment_ids_T[key]
    return mask


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray) -> np.ndarray:
    """One head: q, k [T, d], v [T, d_v] -> [T, d_v]."""
    return softmax(np.where(mask, scale * (q @ k.T), -np.inf)) @ v


def mla(
    x_TD: np.ndarray, tensors: Tensors, prefix: str, config: Config, positions_T: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Multi-head latent attention of one sequence, keys and values expanded for every head: [T, D] -> [T, D].

    `prefix` is `model.layers.{i}.self_attn.`; without `q_lora_rank` the query is one plain projection.
    """
    heads, d_n, d_r = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    d_v, d_c = config["v_head_dim"], config["kv_lora_rank"]
    frequencies, multiplier, scale = rope_frequencies(config), rope_multiplier(config), softmax_scale(config)

    if config.get("q_lora_rank"):
        c_q = rms_norm(linear(x_TD, tensors[f"{prefix}q_a_proj.weight"]), tensors[f"{prefix}q_a_layernorm.weight"], LATENT_EPS)
        q = linear(c_q, tensors[f"{prefix}q_b_proj.weight"])
    else:
        q = linear(x_TD, tensors[f"{prefix}q_proj.weight"])
    compressed = linear(x_TD, tensors[f"{prefix}kv_a_proj_with_mqa.weight"])
    c_kv = rms_norm(compressed[:, :d_c], tensors[f"{prefix}kv_a_layernorm.weight"], LATENT_EPS)
    k_rope = rotate(compressed[:, d_c:], positions_T, frequencies, multiplier)  # one for all heads, not normalised
    kv = linear(c_kv, tensors[f"{prefix}kv_b_proj.weight"])

    outputs = []
    for head in range(heads):
        q_head = q[:, head * (d_n + d_r) : (head + 1) * (d_n + d_r)]
        kv_head = kv[:, head * (d_n + d_v) : (head + 1) * (d_n + d_v)]
        q_rope = rotate(q_head[:, d_n:], positions_T, frequencies, multiplier)
        query = np.concatenate([q_head[:, :d_n], q_rope], axis=1)
        key = np.concatenate([kv_head[:, :d_n], k_rope], axis=1)
        outputs.append(attend(query, key, kv_head[:, d_n:], scale, mask))
    return linear(np.concatenate(outputs, axis=1), tensors[f"{prefix}o_proj.weight"])


def key_value_heads(config: Config) -> int:
    """How many key/value heads standard attention has: all, `num_key_value_heads`, or one."""
    return {"mha": config["num_attention_heads"], "gqa": config["num_key_value_heads"], "mqa": 1}[config["attention"]]


def standard_attention(
    x_TD: np.ndarray, tensors: Tensors, prefix: str, config: Config, positions_T: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """MHA, GQA or MQA of one sequence: [T, D] -> [T, D].

    Heads have d_n + d_r channels, the last d_r of them rotary (interleaved); consecutive query heads share a key/value head.
    """
    heads, kv_heads = config["num_attention_heads"], key_value_heads(config)
    d_n, d_r, d_v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    frequencies, multiplier, scale = rope_frequencies(config), rope_multiplier(config), softmax_scale(config)

    def split_and_rotate(projected: np.ndarray, head: int) -> np.ndarray:
        channels = projected[:, head * (d_n + d_r) : (head + 1) * (d_n + d_r)]
        return np.concatenate([channels[:, :d_n], rotate(channels[:, d_n:], positions_T, frequencies, multiplier)], axis=1)

    q = linear(x_TD, tensors[f"{prefix}q_proj.weight"])
    k = linear(x_TD, tensors[f"{prefix}k_proj.weight"])
    v = linear(x_TD, tensors[f"{prefix}v_proj.weight"])
    outputs = []
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        value = v[:, kv_head * d_v : (kv_head + 1) * d_v]
        outputs.append(attend(split_and_rotate(q, head), split_and_rotate(k, kv_head), value, scale, mask))
    return linear(np.concatenate(outputs, axis=1), tensors[f"{prefix}o_proj.weight"])


def attention(
    x_TD: np.ndarray, tensors: Tensors, prefix: str, config: Config, positions_T: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """The kind that the `attention` field names ("mla" where it is absent, as in released configs)."""
    kind = mla if config.get("attention", "mla") == "mla" else standard_attention
    return kind(x_TD, tensors, prefix, config, positions_T, mask)
