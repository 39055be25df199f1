"""Rotary position embedding in the released interleaved convention, and YaRN [§2.1.1; §4.3].

Channel pairs (2j, 2j+1) are rotated by the angle t * omega_j. Frequencies are static and computed in float64.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, RopeScaling


def yarn_mscale(factor: float, mscale: float) -> float:
    """sqrt(t) of §4.3: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """omega_j, float64 [qk_rope_head_dim / 2], in radians per position; YaRN's where `rope_scaling` is set."""
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    omega = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if yarn is None:
        return omega

    def channel_of(rotations: float) -> float:
        """Channel pair that turns `rotations` times within the original window."""
        return dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(channel_of(yarn.beta_fast)), 0)
    high: float = min(math.ceil(channel_of(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    gamma = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return omega * ((1 - gamma) + gamma / yarn.factor)


def softmax_scale(config: ModelConfig) -> float:
    """(qk head dim)^-1/2, times sqrt(t)^2 under YaRN: mscale enters once for the query and once for the key."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope_scaling
    return scale if yarn is None else scale * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def _table_scale(yarn: RopeScaling | None) -> float:
    """Released code multiplies cos and sin by this ratio; 1 for every released model."""
    return 1.0 if yarn is None else yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def rope_tables(positions_BT: Int[Array, "B T"], config: ModelConfig) -> tuple[Float[Array, "B T J"], Float[Array, "B T J"]]:
    """cos and sin of position * omega_j, float32, J = qk_rope_head_dim / 2."""
    omega_J = jnp.asarray(rope_frequencies(config), jnp.float32)
    angle_BTJ = positions_BT.astype(jnp.float32)[:, :, None] * omega_J[None, None, :]
    scale = _table_scale(config.rope_scaling)
    return jnp.cos(angle_BTJ) * scale, jnp.sin(angle_BTJ) * scale


def apply_rope(
    x_BHTR: Float[Array, "B H T R"], cos_BTJ: Float[Array, "B T J"], sin_BTJ: Float[Array, "B T J"]
) -> Float[Array, "B H T R"]:
    """Rotates interleaved channel pairs, in float32; returns x's dtype."""
    pairs = x_BHTR.astype(jnp.float32).reshape(*x_BHTR.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_BTJ[:, None], sin_BTJ[:, None]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BHTR.shape).astype(x_BHTR.dtype)
