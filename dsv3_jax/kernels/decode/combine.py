"""One softmax from several over parts of the rows, which may be on several devices [§3.4.2]."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def combine(
    part_XBTHC: Float[Array, "X B T H C"], lse_XBTH: Float[Array, "X B T H"], axis_name: str | None = None
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Attention over all rows from X parts of them, each with its log-sum-exp; float32.

    `axis_name`: of a mesh, inside `shard_map`: also over the devices along it, each with its own X parts; all get the result.
    A part that saw no row (-inf) adds nothing, whatever it holds; if none saw any, the result is zeros and -inf.
    """
    lse, part = lse_XBTH.astype(jnp.float32), part_XBTHC.astype(jnp.float32)
    top = lse.max(axis=0)
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
    seen = lse > -jnp.inf
    weight = jnp.where(seen, jnp.exp(lse - jnp.where(top > -jnp.inf, top, 0.0)[None]), 0.0)
    total = weight.sum(axis=0)
    result = jnp.where(seen[..., None], weight[..., None] * part, 0.0).sum(axis=0)
    if axis_name is not None:
        total, result = lax.psum((total, result), axis_name)
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    return result / divisor[..., None], jnp.where(some, top + jnp.log(divisor), -jnp.inf)
