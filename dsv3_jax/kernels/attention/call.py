"""What the implementations of attention have in common: how they are called, and constants and padding of the kernels."""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dsv3_jax.kernels.tiles import padded

LOG2E, LN2 = math.log2(math.e), math.log(2.0)  # softmax is computed in base 2
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # a maximum before any score: -inf less it is -inf, not NaN
NOWHERE = -(2**31)  # the segment of keys of padding, which no query has


class Operands(NamedTuple):
    """As in `api.mla_attention`; rows of padding are zeros."""

    q_content_BHTC: jax.Array
    q_rope_BHTR: jax.Array
    k_content_BHSC: jax.Array
    k_rope_BSR: jax.Array
    v_BHSW: jax.Array
    segments_BS: jax.Array | None
    scale: float


class Forward(Protocol):
    def __call__(self, operands: Operands, *, interpret: Any) -> tuple[jax.Array, jax.Array]:
        """The result in v's dtype, and float32 [B, H, T]: the log of the sum of exp(scores) over the keys that a query sees.

        Both are zeros for a query of padding.
        """


class Backward(Protocol):
    def __call__(
        self, operands: Operands, lse_BHT: jax.Array, delta_BHT: jax.Array, d_out_BHTW: jax.Array, *, interpret: Any
    ) -> tuple[jax.Array, ...]:
        """Gradients with respect to the five arrays; `delta` is the product of a query's result with its gradient, float32."""


def cost_of(operands: Operands, *, products_of_keys: int, products_of_values: int) -> pl.CostEstimate:
    """Of so many products with keys, C + R wide, and with values, W wide, for each pair of a query and a key that it sees.

    For XLA's schedule, and for whoever adds up a program's FLOPs; as if all positions were of one document.
    """
    (B, H, T, C), R, (S, W) = operands.q_content_BHTC.shape, operands.q_rope_BHTR.shape[3], operands.v_BHSW.shape[2:]
    pairs = B * H * (T * S - T * (T - 1) // 2)
    flops = 2 * pairs * (products_of_keys * (C + R) + products_of_values * W)
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in operands[:5])
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=pairs)


def rows_of_segments(segments_BS: jax.Array, offset: int, block_T: int, block_S: int) -> list[jax.Array]:
    """Of queries [B, 1, T] and of keys [B, 1, S], padded; equal where a query may see a key."""
    keys = padded(segments_BS, block_S, -1)
    keys = jnp.where(keys == 0, NOWHERE, keys)
    return [x[:, None, :] for x in (padded(segments_BS[:, offset:], block_T, -1), keys)]
