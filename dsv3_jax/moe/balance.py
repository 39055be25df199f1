"""Load balancing: exact counts, the report's bias controller, and the losses it is compared with, eqs. 16-20 [§2.1.2].

A controller is a named pair: how the bias moves after an optimiser step, and a loss that is added to the objective. Somebody
else's is `controller=package.module:function`, where `function()` returns a `Controller`.

Every loss here is linear in the tokens once the load of the whole optimiser step is known, so micro-batches can simply be
added; `needs_load` asks the training step for a counting pass when there is more than one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.moe.router import Routing, one_hot
from dsv3_jax.plugins import resolve


class Scope(NamedTuple):
    """What the loss of one layer is relative to: the whole batch of an optimiser step, however it is cut up."""

    valid_BT: Bool[Array, "B T"]  # tokens of this micro-batch that count (no padding)
    sequences: Float[Array, ""]  # sequences with a valid token, in the whole step
    tokens: Float[Array, ""]  # valid tokens, in the whole step
    load_E: Int[Array, " E"] | None  # tokens per expert in the whole step; None unless `needs_load`


class Controller(NamedTuple):
    """`move_bias(bias f32[E], load i32[E], speed) -> bias`; `loss(routing, scope, config) -> f32 scalar`, 1 in balance."""

    move_bias: Callable[[Array, Array, Array], Array] | None = None
    loss: Callable[[Routing, Scope, ModelConfig], Array] | None = None
    alpha: float = 0.0  # the loss's weight, unless aux_loss_alpha is set
    needs_load: bool = False


def count_load(indices_BTK: Int[Array, "B T K"], valid_BT: Bool[Array, "B T"], n_experts: int) -> Int[Array, " E"]:
    """Valid tokens per expert, exact int32."""
    chosen = one_hot(indices_BTK, n_experts) & valid_BT[:, :, None, None]
    return chosen.sum(axis=(0, 1, 2), dtype=jnp.int32)


def max_violation(load_E: Int[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """MaxVio: the largest load over the mean load, minus 1; 0 where nothing was routed."""
    load = load_E.astype(jnp.float32)
    mean = load.mean(axis=-1)
    return jnp.where(mean > 0, load.max(axis=-1) / jnp.maximum(mean, 1e-9) - 1.0, 0.0)


def sign_step(bias_E: Float[Array, " E"], load_E: Int[Array, " E"], speed: Float[Array, ""]) -> Float[Array, " E"]:
    """b_i + speed * sign(mean load - load_i): overloaded experts become less attractive; sign(0) = 0.

    Compared in integers against the mean's floor, so that the sign is exact at any batch size.
    """
    mean, remainder = jnp.divmod(load_E.sum(), load_E.shape[0])
    over = load_E > mean
    under = (load_E < mean) | ((load_E == mean) & (remainder > 0))
    return bias_E + speed * (under.astype(jnp.float32) - over.astype(jnp.float32))


def proportional_step(bias_E: Float[Array, " E"], load_E: Int[Array, " E"], speed: Float[Array, ""]) -> Float[Array, " E"]:
    """b_i + speed * (1 - load_i / mean load): the further from balance, the larger the step (arXiv 2408.15664, "b += u e")."""
    mean = jnp.maximum(load_E.astype(jnp.float32).mean(), 1e-9)
    return bias_E + speed * jnp.where(load_E.sum() > 0, 1.0 - load_E.astype(jnp.float32) / mean, 0.0)


def centred_step(bias_E: Float[Array, " E"], load_E: Int[Array, " E"], speed: Float[Array, ""]) -> Float[Array, " E"]:
    """The sign step, with the biases' mean taken out: only their differences select, so that nothing should drift."""
    moved = sign_step(bias_E, load_E, speed)
    return moved - moved.mean()


def sequence_loss(routing: Routing, scope: Scope, config: ModelConfig) -> Float[Array, ""]:
    """Eqs. 17-20: sum_i f_i P_i within each sequence over sigmoid scores normalised over all experts, mean over sequences."""
    n_experts, k = config.n_routed_experts, config.num_experts_per_tok
    valid_BT1 = scope.valid_BT[:, :, None]
    tokens_B1 = jnp.maximum(valid_BT1.sum(axis=1, dtype=jnp.float32), 1.0)
    indices = routing.indices if config.aux_loss_topk == "selected" else jax.lax.top_k(routing.scores, k)[1]
    chosen_BTE = one_hot(indices, n_experts).any(axis=2) & valid_BT1
    f_BE = chosen_BTE.sum(axis=1, dtype=jnp.float32) * (n_experts / k) / tokens_B1
    p_BE = jnp.where(valid_BT1, _normalised(routing.scores), 0.0).sum(axis=1) / tokens_B1
    return (f_BE * p_BE).sum() / jnp.maximum(scope.sequences, 1.0)


def _over_whole_batch(probabilities_BTE: Array, scope: Scope, config: ModelConfig) -> Array:
    """sum_i f_i P_i with f from the whole step's load; this micro-batch's share of P."""
    assert scope.load_E is not None
    tokens = jnp.maximum(scope.tokens, 1.0)
    f_E = scope.load_E.astype(jnp.float32) * (config.n_routed_experts / config.num_experts_per_tok) / tokens
    p_E = jnp.where(scope.valid_BT[:, :, None], probabilities_BTE, 0.0).sum(axis=(0, 1)) / tokens
    return (f_E * p_E).sum()


def batch_loss(routing: Routing, scope: Scope, config: ModelConfig) -> Float[Array, ""]:
    """The sequence-wise loss with f and P taken over the whole batch instead [§4.5.3]."""
    return _over_whole_batch(_normalised(routing.scores), scope, config)


def classical_loss(routing: Routing, scope: Scope, config: ModelConfig) -> Float[Array, ""]:
    """The auxiliary loss of GShard, Switch and DeepSeek-V2's expert level: softmax probabilities, over the whole batch."""
    return _over_whole_batch(jax.nn.softmax(routing.logits, axis=-1), scope, config)


def _normalised(scores_BTE: Array) -> Array:
    return scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)


def sign() -> Controller:
    """The report's: the bias moves against the load error, beside a sequence-wise loss of weight 1e-4."""
    return Controller(move_bias=sign_step, loss=sequence_loss, alpha=1e-4)


def proportional() -> Controller:
    return Controller(move_bias=proportional_step, loss=sequence_loss, alpha=1e-4)


def centred() -> Controller:
    return Controller(move_bias=centred_step, loss=sequence_loss, alpha=1e-4)


def sequence() -> Controller:
    return Controller(loss=sequence_loss, alpha=1e-3)


def batch() -> Controller:
    return Controller(loss=batch_loss, alpha=1e-3, needs_load=True)


def classical() -> Controller:
    return Controller(loss=classical_loss, alpha=1e-3, needs_load=True)


def none() -> Controller:
    return Controller()


CONTROLLERS = {
    "sign": sign, "proportional": proportional, "centred": centred,
    "sequence": sequence, "batch": batch, "classical": classical, "none": none,
}  # fmt: skip


def controller_of(config: Config) -> Controller:
    """The configured controller, with `aux_loss_alpha` applied; a loss of weight 0 is dropped.

    Raises ValueError if a `package.module:function` cannot be loaded or does not return a Controller.
    """
    controller = resolve("controller", config.train.controller, CONTROLLERS)()
    if not isinstance(controller, Controller):
        raise ValueError(f"controller: {config.train.controller!r} returned {type(controller).__name__}, expected a Controller")
    if config.train.aux_loss_alpha is not None:
        controller = controller._replace(alpha=config.train.aux_loss_alpha)
    return controller if controller.alpha > 0 else controller._replace(loss=None, needs_load=False)
