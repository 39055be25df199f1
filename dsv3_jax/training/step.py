"""One optimiser step as a pure function, `(state, batch, hyper) -> (state, metrics)`, compiled once [§2.1.2, §4.2].

The batch comes cut into micro-batches; gradients, losses and expert counts are summed over them, the bias moves once. On a
mesh the gradients come from one `shard_map`, in which each device adds up its own rows' share, and the optimiser runs on the
pieces in which its state lies.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.fp8.delayed import advanced, apart, beside, first_history
from dsv3_jax.fp8.precision import is_linear
from dsv3_jax.model.module import Variables, abstract_variables, init_variables, model_spec
from dsv3_jax.moe.balance import Controller, controller_of, count_load, max_violation
from dsv3_jax.moe.router import Routing, check_router
from dsv3_jax.parallel.collectives import Placement, own_copies, reduced, sum_over_batch, varying_like
from dsv3_jax.parallel.rules import state_specs
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

# tokens, segment_ids, domain_ids, and optionally "forced", as in `objective.Batch`; trailing rows may be all padding
MicroBatches = Mapping[str, Int[Array, "A B S"] | Int[Array, "A B T L K"]]
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a step changes. What the optimiser touches (`params`) and what it does not (`bias`) are apart."""

    params: Any
    opt_state: OptState
    bias: Float[Array, "L E"]
    step: Int[Array, ""]  # steps taken, skipped ones included
    skipped_in_row: Int[Array, ""]
    skipped_total: Int[Array, ""]
    amax: Any = None  # magnitudes of earlier steps, for delayed FP8 scaling alone


class Hyper(NamedTuple):
    """This step's values of what follows a schedule over tokens."""

    learning_rate: Float[Array, ""]
    bias_update_speed: Float[Array, ""]
    mtp_loss_weight: Float[Array, ""]


def init_state(config: Config) -> TrainState:
    return _first_state(init_variables(config.model, config.train.seed, config.train.init_ulps), config)


def abstract_state(config: Config) -> TrainState:
    """Shapes and dtypes of `init_state`, without allocating anything."""
    return jax.eval_shape(lambda variables: _first_state(variables, config), abstract_variables(config.model))


def _first_state(variables: Variables, config: Config) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    opt_state = init_optimizer(config.train, variables.params)
    amax = None
    if config.model.fp8 and config.model.fp8.scaling == "delayed":
        amax = first_history(variables.params, config.model.fp8.amax_history, partial(is_linear, config=config.model))
    return TrainState(variables.params, opt_state, variables.bias_LE, zero, zero.copy(), zero.copy(), amax)


def make_train_step(
    config: Config, n_domains: int, placement: Placement | None = None
) -> Callable[[TrainState, MicroBatches, Hyper], tuple[TrainState, Metrics]]:
    """The compiled step; its first argument is donated.

    With a `placement` the state lies as `state_shardings` says, before and after, and the batch as `placement.batch_spec`.

    Raises ValueError if a controller, score function or selector cannot be loaded or does not keep to its signature.
    """
    if config.model.n_moe_layers:
        check_router(config.model)
    step = partial(train_step, config=config, controller=controller_of(config), n_domains=n_domains, placement=placement)
    if placement is None:
        return jax.jit(step, donate_argnums=0)
    out_shardings = state_shardings(config, placement), placement.sharding(PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def state_shardings(config: Config, placement: Placement) -> Any:
    """A TrainState of NamedSharding: parameters as the layout stores them, moments and masters in pieces (ZeRO-1).

    Raises ValueError, naming the parameter and the axis, where a mesh axis does not divide, and for delayed FP8 scaling.
    """
    if config.model.fp8 and config.model.fp8.scaling == "delayed":
        raise ValueError("fp8: delayed scaling runs on one device, got a mesh; take scaling fine or tensor, or layout=single")
    spec, replicated = model_spec(config.model), placement.sharding(PartitionSpec())
    params, pieces = (
        jax.tree.map(placement.sharding, specs) for specs in (placement.stored_specs(spec), state_specs(spec, placement.sizes))
    )
    has_masters = abstract_state(config).opt_state.master is not None
    opt_state: Any = OptState(pieces, pieces, pieces if has_masters else None, n_updates=replicated)  # type: ignore[arg-type]
    return TrainState(params, opt_state, *[replicated] * 4)  # type: ignore[arg-type]


def train_step(
    state: TrainState,
    batch: MicroBatches,
    hyper: Hyper,
    *,
    config: Config,
    controller: Controller,
    n_domains: int,
    placement: Placement | None = None,
) -> tuple[TrainState, Metrics]:
    """One step; with a non-finite loss or gradient, nothing but the counters changes."""
    grads, terms = gradients(state, batch, hyper, config, controller, n_domains, placement)
    grads, amax_now = apart(grads)
    if placement is not None:  # the optimiser works on the pieces in which gradients and moments lie
        pieces = state_shardings(config, placement).opt_state.mu
        state = state._replace(params=jax.lax.with_sharding_constraint(state.params, pieces))
    grad_norm = global_norm(grads)
    finite = jnp.isfinite(terms.loss) & jnp.isfinite(grad_norm)

    params, opt_state = apply_optimizer(config.train, grads, state.opt_state, state.params, hyper.learning_rate, grad_norm)
    bias = move_bias(state.bias, terms.load_LE, hyper.bias_update_speed, config, controller)
    amax = None if state.amax is None else advanced(state.amax, amax_now)
    moved, kept = (params, opt_state, bias, amax), (state.params, state.opt_state, state.bias, state.amax)
    params, opt_state, bias, amax = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)

    skipped = jnp.logical_not(finite).astype(jnp.int32)
    in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    new_state = TrainState(params, opt_state, bias, state.step + 1, in_row, state.skipped_total + skipped, amax)
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


def all_rows(batch: MicroBatches) -> dict[str, Array]:
    """The sequences of all micro-batches as one."""
    return {name: a.reshape(-1, *a.shape[2:]) for name, a in batch.items()}


def gradients(
    state: TrainState,
    batch: MicroBatches,
    hyper: Hyper,
    config: Config,
    controller: Controller,
    n_domains: int,
    placement: Placement | None = None,
) -> tuple[Any, Terms]:
    """Gradient of the whole batch's objective, float32 where there are several micro-batches, and the step's sums.

    On a mesh the gradient lies in pieces, as the optimiser's moments do.
    """
    local = partial(_own_gradients, config=config, controller=controller, n_domains=n_domains, placement=placement)
    arguments = beside(state.params, state.amax), state.bias, batch, hyper
    if placement is None:
        return local(*arguments)
    spec, nowhere = model_spec(config.model), PartitionSpec()
    in_specs = placement.stored_specs(spec), nowhere, placement.batch_spec, nowhere
    out_specs = state_specs(spec, placement.sizes), nowhere
    return jax.shard_map(local, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs)(*arguments)


def _own_gradients(
    params: Any,
    bias_LE: Array,
    batch: MicroBatches,
    hyper: Hyper,
    config: Config,
    controller: Controller,
    n_domains: int,
    placement: Placement | None,
) -> tuple[Any, Terms]:
    """`gradients` of the rows that are here, summed over the mesh at the end."""
    n_micro = batch["tokens"].shape[0]
    totals = batch_totals(all_rows(batch), config, placement)
    in_use_A = sum_over_batch((batch["segment_ids"] != 0).any(axis=(1, 2)).astype(jnp.int32), placement) > 0
    used = in_use_A.sum(dtype=jnp.int32)  # the rest is a ramp's padding
    params = own_copies(params, placement)

    def micro(i: Any) -> dict[str, Array]:
        return {name: a[i] for name, a in batch.items()}

    if controller.needs_load and n_micro > 1:

        def count(i: Array, load_LE: Array) -> Array:
            return load_LE + count_batch(params, bias_LE, micro(i), config, placement)

        none = varying_like(batch, jnp.zeros(bias_LE.shape, jnp.int32))
        totals = totals._replace(load_LE=sum_over_batch(jax.lax.fori_loop(0, used, count, none), placement))

    def gradient(i: Any, totals: Totals) -> tuple[Any, Terms]:
        fixed = (bias_LE, micro(i), totals, hyper.mtp_loss_weight, config, controller, n_domains, placement)
        return jax.grad(objective, has_aux=True)(params, *fixed)

    def accumulate(i: Array, sums: Any) -> Any:
        (grads, terms), (more, more_terms) = sums, gradient(i, totals)
        total = jax.tree.map(lambda s, x: s + x.astype(s.dtype), (apart(grads)[0], terms), (apart(more)[0], more_terms))
        amax = jax.tree.map(jnp.maximum, apart(grads)[1], apart(more)[1])
        return beside(total[0], amax), total[1]

    if n_micro == 1:
        grads, terms = gradient(0, totals)
    else:
        wide = {jnp.dtype(jnp.bfloat16): jnp.float32}
        shapes = jax.eval_shape(gradient, 0, totals)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide.get(x.dtype, x.dtype)), shapes)
        start = jax.tree.map(varying_like, params, zeros[0]), varying_like(batch, zeros[1])
        grads, terms = jax.lax.fori_loop(0, used, accumulate, start)
    return reduced(grads, model_spec(config.model), placement), sum_over_batch(terms, placement)


def make_eval_step(
    config: Config, n_domains: int, placement: Placement | None = None
) -> Callable[[Any, Float[Array, "L E"], MicroBatches], Metrics]:
    """Compiled `(params, bias, batch) -> sums` over one batch of held-out data; changes no count and no bias."""

    def evaluate(params: Any, bias_LE: Array, batch: MicroBatches) -> Metrics:
        flat = all_rows(batch)
        input_domains = flat["domain_ids"][:, :-1]

        def domain_load(routing: Routing, extra: Any) -> Array:
            def one_domain(domain: Array) -> Array:
                return count_load(routing.indices, extra[0] & (input_domains == domain), config.model.n_routed_experts)

            return jax.vmap(one_domain)(jnp.arange(n_domains, dtype=jnp.int32))

        main, depths, domain_load_LME = run_model(params, bias_LE, flat, config, domain_load, None, placement)
        losses = depth_losses(params, flat, [main.normed_BTD, *(d.normed_BTD for d in depths)], config, placement)
        domain_loss_M, domain_targets_M = by_domain(flat, losses[0][1], n_domains)
        sums = {
            "domain_loss_sum": domain_loss_M,
            "domain_tokens": domain_targets_M,
            "load": domain_load_LME.sum(axis=1),
            "domain_load": domain_load_LME,
            "mtp_loss_sum": jnp.stack([total for total, _ in losses])[1:],
            "mtp_tokens": batch_totals(flat, config).targets_Q[1:].astype(jnp.int32),
        }
        return sum_over_batch(sums, placement)

    if placement is None:
        return jax.jit(evaluate)
    nowhere = PartitionSpec()
    in_specs = placement.stored_specs(model_spec(config.model)), nowhere, placement.batch_spec
    return jax.jit(jax.shard_map(evaluate, mesh=placement.mesh, in_specs=in_specs, out_specs=nowhere))
