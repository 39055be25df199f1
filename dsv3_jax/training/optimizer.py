"""AdamW with moments in BF16 or FP32 and FP32 master weights beside BF16 parameters [§3.3.3, §4.2].

Own code because `optax.adamw` has no dtype for the second moment, and because clipping, decay and rounding inside the one
pass over each tensor cost no extra trip to memory, which is what an optimiser spends its time on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from dsv3_jax.config import TrainConfig


class OptState(NamedTuple):
    """Each tree mirrors the parameters; `master` is None when the parameters themselves are float32."""

    mu: PyTree[Float[Array, "..."]]  # moment_dtype
    nu: PyTree[Float[Array, "..."]]  # moment_dtype
    master: PyTree[Float[Array, "..."]] | None  # float32
    n_updates: Int[Array, ""]  # updates applied, int32


def is_norm(path: tuple[Any, ...]) -> bool:
    """Whether a parameter's path leads to a norm's gain. By name: stacking layers adds axes, so ndim says nothing."""
    return any("norm" in str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)


def init_optimizer(train: TrainConfig, params: PyTree[Float[Array, "..."]]) -> OptState:
    """Zero moments in `moment_dtype`; float32 masters if any parameter is of a narrower dtype."""

    def zeros() -> Any:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, train.moment_dtype), params)

    narrow = any(p.dtype != jnp.float32 for p in jax.tree.leaves(params))
    # copy: a float32 gain must not share its buffer with its master, both are donated to the step
    master = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) if narrow else None
    return OptState(zeros(), zeros(), master, jnp.zeros((), jnp.int32))


def global_norm(grads: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
    """Euclidean norm over all leaves, summed in float32."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)), jnp.float32(0)))


def apply_optimizer(
    train: TrainConfig,
    grads: PyTree[Float[Array, "..."]],
    state: OptState,
    params: PyTree[Float[Array, "..."]],
    learning_rate: Float[Array, ""],
    grad_norm: Float[Array, ""],
) -> tuple[PyTree[Float[Array, "..."]], OptState]:
    """One AdamW step: gradients clipped to the global norm `grad_clip`, decay decoupled and scaled by the learning rate.

    Norm gains do not decay unless `decay_norms`. All arithmetic is float32, whatever the stored dtypes are.
    """
    n_updates = state.n_updates + 1
    t = n_updates.astype(jnp.float32)
    b1, b2 = train.adam_b1, train.adam_b2
    bias1, bias2 = 1 - jnp.float32(b1) ** t, 1 - jnp.float32(b2) ** t
    clip = train.grad_clip / jnp.maximum(grad_norm, train.grad_clip)  # 1 up to the limit, and no division by a zero norm

    def update(path: Any, g: Any, mu: Any, nu: Any, weight: Any) -> tuple[Any, Any, Any]:
        g, mu, nu = (clip * g.astype(jnp.float32), mu.astype(jnp.float32), nu.astype(jnp.float32))
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
        direction = (mu / bias1) / (jnp.sqrt(nu / bias2) + train.adam_eps)
        if train.decay_norms or not is_norm(path):
            direction += train.weight_decay * weight
        return weight - learning_rate * direction, mu.astype(train.moment_dtype), nu.astype(train.moment_dtype)

    weights = params if state.master is None else state.master
    updated = jax.tree_util.tree_map_with_path(update, grads, state.mu, state.nu, weights)
    weights, mu, nu = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), updated)
    rounded = jax.tree.map(lambda w, p: w.astype(p.dtype), weights, params)
    return rounded, OptState(mu, nu, None if state.master is None else weights, n_updates)
