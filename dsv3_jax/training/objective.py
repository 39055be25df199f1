"""The objective of §2.2 and §2.1.2: cross entropy + lambda * MTP + alpha * balance, of one micro-batch.

Every term is a sum over this micro-batch divided by a total over the whole optimiser step (`Totals`), so the objective of
a step is the plain sum over its micro-batches, whatever their number, padding included. On a mesh the same holds of the
devices' shares: each sees its own rows, and only totals and final sums are taken over all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.mtp import Depth, all_layers, mtp_forward, predicts_within_document, shifted
from dsv3_jax.model.transformer import Hidden, Summary, forward, head, head_name, make_context
from dsv3_jax.moe.balance import Controller, Scope, count_load
from dsv3_jax.moe.router import Routing
from dsv3_jax.parallel.collectives import Placement, sum_over_batch, varying_like
from dsv3_jax.training.loss import chunk_length, cross_entropy

# tokens, segment_ids, domain_ids; S = inputs and the last target. And "forced", optional: experts that each MoE layer's router
# has to use for each input token, MTP's layers last, E where it is free (`moe.router.route`); in the order of a routing trace.
Batch = Mapping[str, Int[Array, "B S"] | Int[Array, "B T L K"]]


class Totals(NamedTuple):
    """What the terms are divided by, over all micro-batches of a step; float32. Depth 0 is the main model."""

    targets_Q: Float[Array, " Q"]  # predicted tokens of each depth, Q = 1 + MTP depths
    tokens_L: Float[Array, " L"]  # tokens that each MoE layer's router counts
    sequences_L: Float[Array, " L"]  # rows that have such a token
    load_LE: Int[Array, "L E"] | None  # from the counting pass, where the controller needs one


class Terms(NamedTuple):
    """One micro-batch's share of the step's sums; adding them over micro-batches gives the step's values."""

    loss: Float[Array, ""]
    depth_loss_Q: Float[Array, " Q"]  # mean nats per target of each depth
    balance_loss: Float[Array, ""]  # weighted by alpha
    load_LE: Int[Array, "L E"]
    domain_loss_M: Float[Array, " M"]  # sum of nats by the target's domain
    domain_targets_M: Int[Array, " M"]


def counted_tokens(batch: Batch, config: Config) -> list[Bool[Array, "B T"]]:
    """Tokens that each MoE layer's router counts: all but padding; in an MTP layer, those that have a target."""
    main = batch["segment_ids"][:, :-1] != 0
    depths = range(1, config.model.num_nextn_predict_layers + 1)
    return [main] * config.model.n_main_moe_layers + [predicts_within_document(batch["segment_ids"], k) for k in depths]


def batch_totals(batch: Batch, config: Config, placement: Placement | None = None) -> Totals:
    """Totals over a batch of all rows of an optimiser step; counted as integers, exact at any batch size."""
    depths = range(config.model.num_nextn_predict_layers + 1)
    depth_targets = [predicts_within_document(batch["segment_ids"], k).sum(dtype=jnp.int32) for k in depths]
    counted, n_main = counted_tokens(batch, config), config.model.n_main_moe_layers

    def per_layer(count: Callable[[Array], Array]) -> Array:
        # The main layers count the same tokens: once for all of them, so that the program does not grow with depth.
        main = [jnp.broadcast_to(count(c), (n_main,)) for c in counted[: min(n_main, 1)]]
        return jnp.concatenate([*main, *(count(c)[None] for c in counted[n_main:]), jnp.zeros((0,), jnp.int32)])

    tokens = per_layer(lambda c: c.sum(dtype=jnp.int32))
    sequences = per_layer(lambda c: c.any(axis=1).sum(dtype=jnp.int32))
    counts = sum_over_batch((jnp.stack(depth_targets), tokens, sequences), placement)
    targets_Q, tokens_L, sequences_L = (count.astype(jnp.float32) for count in counts)
    return Totals(targets_Q, tokens_L, sequences_L, load_LE=None)


def forced_layers(batch: Batch) -> Int[Array, "L B T K"] | None:
    """The experts that the batch forces, if any, by layer."""
    return jnp.moveaxis(batch["forced"], 2, 0) if "forced" in batch else None


def run_model(
    params: Any,
    bias_LE: Float[Array, "L E"],
    batch: Batch,
    config: Config,
    summary: Summary,
    extras_L: Any,
    placement: Placement | None = None,
) -> tuple[Hidden, list[Depth], Any]:
    """Main and MTP forward passes; `summary(routing, (counted, extra))` of every MoE layer, stacked [L, ...]."""
    model, n_main = config.model, config.model.n_main_moe_layers
    tokens, segments = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    context = make_context(segments, model, cross_document=config.data.cross_document_attention, placement=placement)
    counted = counted_tokens(batch, config)

    def summarise_main(routing: Routing, extra: Any) -> Any:
        return summary(routing, (counted[0], extra))

    rows = {"extras": extras_L, "forced_LBTK": forced_layers(batch)}
    main_rows, mtp_rows = (jax.tree.map(lambda a, s=s: a[s], rows) for s in (slice(n_main), slice(n_main, None)))
    main = forward(params, bias_LE, tokens, context, model, summary=summarise_main, **main_rows)
    if not model.num_nextn_predict_layers:
        return main, [], main.layers
    mtp_rows["extras"] = jnp.stack(counted[n_main:]), mtp_rows["extras"]
    depths = mtp_forward(params, bias_LE, tokens, main, context, model, summary=summary, **mtp_rows)
    return main, depths, all_layers(main, depths)


def count_batch(
    params: Any, bias_LE: Float[Array, "L E"], batch: Batch, config: Config, placement: Placement | None = None
) -> Int[Array, "L E"]:
    """Load of every MoE layer's experts from these rows, by a forward pass alone."""

    def count(routing: Routing, extra: Any) -> Array:
        return count_load(routing.indices, extra[0], config.model.n_routed_experts)

    return run_model(params, bias_LE, batch, config, count, None, placement)[2]


def depth_losses(
    params: Any, batch: Batch, hidden: list[Array], config: Config, placement: Placement | None = None
) -> list[tuple[Array, Array]]:
    """(sum over targets, nats [B, T] with 0 where there is none) of each depth; `hidden` holds every depth's normed states."""
    vocab_axis = placement.tensor_axis if placement else None
    if vocab_axis is None:
        # Together through a barrier: in the backward pass the head's gradient, whole and in float32, is then reduced to the
        # device's piece before the layers' turn comes, instead of lying beside all that they need. Tensor ranks, which have
        # pieces anyway, hold head and hidden states of different kinds, as `shard_map` counts, and a barrier wants equal ones.
        name = head_name(config.model)
        params, hidden = jax.lax.optimization_barrier(({name: params[name]}, hidden))
    weight_VD = head(params, config.model, placement).astype(hidden[0].dtype)
    weight_VD = varying_like(hidden, weight_VD)  # before `custom_vjp`: so a rank's gradient is of its own rows
    batch_size, length, _ = hidden[0].shape
    chunk = chunk_length(batch_size, length, weight_VD.shape[0], config.train.loss_chunk_elements)
    losses = []
    for k, hidden_BTD in enumerate(hidden):
        targets = shifted(batch["tokens"], k + 1)[:, :-1]
        weights = predicts_within_document(batch["segment_ids"], k).astype(jnp.float32)
        total, nll_BT = cross_entropy(hidden_BTD, weight_VD, targets, weights, chunk, vocab_axis)
        losses.append((total, nll_BT * weights))
    return losses


def by_domain(batch: Batch, nll_BT: Float[Array, "B T"], n_domains: int) -> tuple[Array, Array]:
    """Sum of nats and number of the main model's targets, by the domain of the target: f32 [M], int32 [M]."""
    has_target = predicts_within_document(batch["segment_ids"], 0)
    domains = jnp.arange(n_domains, dtype=jnp.int32)
    is_domain = (batch["domain_ids"][:, 1:, None] == domains[None, None, :]) & has_target[:, :, None]
    return jnp.where(is_domain, nll_BT[:, :, None], 0.0).sum(axis=(0, 1)), is_domain.sum(axis=(0, 1), dtype=jnp.int32)


def objective(
    params: Any,
    bias_LE: Float[Array, "L E"],
    batch: Batch,
    totals: Totals,
    mtp_weight: Float[Array, ""],
    config: Config,
    controller: Controller,
    n_domains: int,
    placement: Placement | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """This micro-batch's (and, on a mesh, this device's) share of the step's objective, differentiable in `params`."""
    model, train = config.model, config.train

    def summarise(routing: Routing, extra: Any) -> tuple[Array, Array]:
        valid, (tokens, sequences, load) = extra
        own_load = count_load(routing.indices, valid, model.n_routed_experts)
        if controller.loss is None:
            return own_load, jnp.float32(0)
        if load is None and controller.needs_load:  # the step has one micro-batch: its load is that of all devices' rows
            load = sum_over_batch(own_load, placement)
        scope = Scope(valid, sequences, tokens, load)
        return own_load, controller.loss(routing, scope, model)

    extras_L = (totals.tokens_L, totals.sequences_L, totals.load_LE)
    main, depths, layers = run_model(params, bias_LE, batch, config, summarise, extras_L, placement)
    load_LE, balance_L = layers or (jnp.zeros((0, model.n_routed_experts), jnp.int32), jnp.zeros((0,), jnp.float32))

    losses = depth_losses(params, batch, [main.normed_BTD, *(d.normed_BTD for d in depths)], config, placement)
    depth_loss_Q = jnp.stack([total for total, _ in losses]) / jnp.maximum(totals.targets_Q, 1.0)
    mtp = mtp_weight * depth_loss_Q[1:].sum() / max(1, model.num_nextn_predict_layers)

    balanced = balance_L if train.balance_mtp else balance_L[: model.n_main_moe_layers]
    n_summed = max(1, balanced.shape[0]) if train.aux_loss_reduction == "mean" else 1
    balance = controller.alpha * balanced.sum() / n_summed
    loss = depth_loss_Q[0] + mtp + balance
    return loss, Terms(loss, depth_loss_Q, balance, load_LE, *by_domain(batch, losses[0][1], n_domains))
