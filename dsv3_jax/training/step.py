"""One optimiser step as a pure function, `(state, batch, hyper) -> (state, metrics)`, compiled once [§2.1.2, §4.2].

The batch comes cut into micro-batches; gradients, losses and expert counts are summed over them, the bias moves once.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.module import Variables, abstract_variables, init_variables
from dsv3_jax.moe.balance import Controller, controller_of, count_load, max_violation
from dsv3_jax.moe.router import Routing, check_router
from dsv3_jax.training.objective import (
    Terms,
    Totals,
    batch_totals,
    by_domain,
    count_batch,
    depth_losses,
    objective,
    run_model,
)
from dsv3_jax.training.optimizer import OptState, apply_optimizer, global_norm, init_optimizer

MicroBatches = Mapping[str, Int[Array, "A B S"]]  # tokens, segment_ids, domain_ids; trailing rows may be all padding
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a step changes. What the optimiser touches (`params`) and what it does not (`bias`) are apart."""

    params: Any
    opt_state: OptState
    bias: Float[Array, "L E"]
    step: Int[Array, ""]  # steps taken, skipped ones included
    skipped_in_row: Int[Array, ""]
    skipped_total: Int[Array, ""]


class Hyper(NamedTuple):
    """This step's values of what follows a schedule over tokens."""

    learning_rate: Float[Array, ""]
    bias_update_speed: Float[Array, ""]
    mtp_loss_weight: Float[Array, ""]


def init_state(config: Config) -> TrainState:
    return _first_state(init_variables(config.model, config.train.seed), config)


def abstract_state(config: Config) -> TrainState:
    """Shapes and dtypes of `init_state`, without allocating anything."""
    return jax.eval_shape(lambda variables: _first_state(variables, config), abstract_variables(config.model))


def _first_state(variables: Variables, config: Config) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    opt_state = init_optimizer(config.train, variables.params)
    return TrainState(variables.params, opt_state, variables.bias_LE, zero, zero.copy(), zero.copy())


def make_train_step(config: Config, n_domains: int) -> Callable[[TrainState, MicroBatches, Hyper], tuple[TrainState, Metrics]]:
    """The compiled step; its first argument is donated.

    Raises ValueError if a controller, score function or selector cannot be loaded or does not keep to its signature.
    """
    if config.model.n_moe_layers:
        check_router(config.model)
    step = partial(train_step, config=config, controller=controller_of(config), n_domains=n_domains)
    return jax.jit(step, donate_argnums=0)


def train_step(
    state: TrainState, batch: MicroBatches, hyper: Hyper, *, config: Config, controller: Controller, n_domains: int
) -> tuple[TrainState, Metrics]:
    """One step; with a non-finite loss or gradient, nothing but the counters changes."""
    grads, terms = gradients(state, batch, hyper, config, controller, n_domains)
    grad_norm = global_norm(grads)
    finite = jnp.isfinite(terms.loss) & jnp.isfinite(grad_norm)

    params, opt_state = apply_optimizer(
        config.train, grads, state.opt_state, state.params, hyper.learning_rate, grad_norm
    )
    bias = move_bias(state.bias, terms.load_LE, hyper.bias_update_speed, config, controller)
    moved, kept = (params, opt_state, bias), (state.params, state.opt_state, state.bias)
    params, opt_state, bias = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)

    skipped = jnp.logical_not(finite).astype(jnp.int32)
    in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    new_state = TrainState(params, opt_state, bias, state.step + 1, in_row, state.skipped_total + skipped)
    return new_state, {
        "loss": terms.loss,
        "main_loss": terms.depth_loss_Q[0],
        "mtp_loss": terms.depth_loss_Q[1:].sum() / max(1, config.model.num_nextn_predict_layers),
        "balance_loss": terms.balance_loss,
        "grad_norm": grad_norm,
        "max_vio": max_violation(terms.load_LE),
        "load": terms.load_LE,
        "dead_experts": (terms.load_LE == 0).sum(axis=-1, dtype=jnp.int32),
        "domain_loss_sum": terms.domain_loss_M,
        "domain_tokens": terms.domain_targets_M,
        "tokens": terms.domain_targets_M.sum(),
        "nonfinite": jnp.logical_not(finite),
    }


def move_bias(
    bias_LE: Float[Array, "L E"], load_LE: Int[Array, "L E"], speed: Float[Array, ""], config: Config, controller: Controller
) -> Float[Array, "L E"]:
    """The controller's move in every MoE layer; MTP layers only if `balance_mtp`."""
    if controller.move_bias is None:
        return bias_LE
    moved = jax.vmap(controller.move_bias, in_axes=(0, 0, None))(bias_LE, load_LE, speed)
    n_moved = bias_LE.shape[0] if config.train.balance_mtp else config.model.n_main_moe_layers
    return jnp.concatenate([moved[:n_moved], bias_LE[n_moved:]])


def gradients(
    state: TrainState, batch: MicroBatches, hyper: Hyper, config: Config, controller: Controller, n_domains: int
) -> tuple[Any, Terms]:
    """Gradient of the whole batch's objective, float32 where there are several micro-batches, and the step's sums."""
    n_micro, _, window = batch["tokens"].shape
    totals = batch_totals({name: a.reshape(-1, window) for name, a in batch.items()}, config)
    used = (batch["segment_ids"] != 0).any(axis=(1, 2)).sum(dtype=jnp.int32)  # the rest is a ramp's padding

    def micro(i: Any) -> dict[str, Array]:
        return {name: a[i] for name, a in batch.items()}

    if controller.needs_load and n_micro > 1:

        def count(i: Array, load_LE: Array) -> Array:
            return load_LE + count_batch(state.params, state.bias, micro(i), config)

        load_LE = jax.lax.fori_loop(0, used, count, jnp.zeros(state.bias.shape, jnp.int32))
        totals = totals._replace(load_LE=load_LE)

    def gradient(i: Any, totals: Totals) -> tuple[Any, Terms]:
        fixed = (state.bias, micro(i), totals, hyper.mtp_loss_weight, config, controller, n_domains)
        return jax.grad(objective, has_aux=True)(state.params, *fixed)

    if n_micro == 1:
        return gradient(0, totals)

    def accumulate(i: Array, sums: Any) -> Any:
        return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, gradient(i, totals))

    shapes = jax.eval_shape(gradient, 0, totals)
    wide = {jnp.dtype(jnp.bfloat16): jnp.float32}
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, wide.get(x.dtype, x.dtype)), shapes)
    return jax.lax.fori_loop(0, used, accumulate, start)


def make_eval_step(config: Config, n_domains: int) -> Callable[[Any, Float[Array, "L E"], MicroBatches], Metrics]:
    """Compiled `(params, bias, batch) -> sums` over one batch of held-out data; changes no count and no bias."""

    def evaluate(params: Any, bias_LE: Array, batch: MicroBatches) -> Metrics:
        flat = {name: a.reshape(-1, a.shape[-1]) for name, a in batch.items()}
        input_domains = flat["domain_ids"][:, :-1]

        def domain_load(routing: Routing, extra: Any) -> Array:
            def one_domain(domain: Array) -> Array:
                return count_load(routing.indices, extra[0] & (input_domains == domain), config.model.n_routed_experts)

            return jax.vmap(one_domain)(jnp.arange(n_domains, dtype=jnp.int32))

        main, depths, domain_load_LME = run_model(params, bias_LE, flat, config, domain_load, None)
        losses = depth_losses(params, flat, [main.normed_BTD, *(d.normed_BTD for d in depths)], config)
        domain_loss_M, domain_targets_M = by_domain(flat, losses[0][1], n_domains)
        return {
            "domain_loss_sum": domain_loss_M,
            "domain_tokens": domain_targets_M,
            "load": domain_load_LME.sum(axis=1),
            "domain_load": domain_load_LME,
            "mtp_loss_sum": jnp.stack([total for total, _ in losses])[1:],
            "mtp_tokens": batch_totals(flat, config).targets_Q[1:].astype(jnp.int32),
        }

    return jax.jit(evaluate)
