"""Faulty copies of parts of the package, each a bug that another implementation shipped; tests/test_mutants.py runs them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import dsv3_jax.fp8.precision as precision
import dsv3_jax.interop.read as read
import dsv3_jax.model.mla as mla
import dsv3_jax.model.mtp as mtp
import dsv3_jax.model.rope as rope
import dsv3_jax.moe.balance as balance
import dsv3_jax.moe.layer as layer
import dsv3_jax.moe.router as router
import dsv3_jax.training.objective as objective
import dsv3_jax.training.step as step

# The sound functions: a faulty copy must reach them while itself stands in their place.
sound = {
    (module, name): getattr(module, name)
    for module, name in [
        (balance, "count_load"), (balance, "sequence_loss"), (layer, "route"), (router, "gates"), (router, "route"),
        (mla, "apply_rope"), (mla, "softmax_scale"), (rope, "rope_frequencies"), (mtp, "shifted"), (mtp, "module"),
        (mtp, "predicts_within_document"), (step, "move_bias"), (step, "objective"), (step, "batch_totals"),
        (step, "gradients"), (step, "sum_over_batch"), (step, "reduced"), (objective, "depth_losses"), (objective, "run_model"),
        (read, "fill_matrix"), (read, "_fill"),
    ]
}  # fmt: skip


# 1, 2, 4: the controller and its counts ------------------------------------------------------------------------------


def frozen_bias(bias_LE, load_LE, speed, config, controller):
    return bias_LE


def reversed_sign(bias_E, load_E, speed):
    return 2 * bias_E - balance.sign_step(bias_E, load_E, speed)


def count_padding(indices, valid, n_experts):
    return sound[balance, "count_load"](indices, jnp.ones_like(valid), n_experts)


def gradients_with_last_counts(state, batch, hyper, config, controller, n_domains, placement=None):
    """The load of the last micro-batch with tokens alone, as if each had overwritten the counter."""
    grads, terms = sound[step, "gradients"](state, batch, hyper, config, controller, n_domains, placement)
    last = jax.tree.map(lambda a: a[-1:], batch)
    load_LE = sound[step, "gradients"](state, last, hyper, config, controller, n_domains, placement)[1].load_LE
    return grads, terms._replace(load_LE=load_LE)


def gradients_with_bias_moved_per_micro_batch(state, batch, hyper, config, controller, n_domains, placement=None):
    for i in range(batch["tokens"].shape[0]):
        one = jax.tree.map(lambda a, i=i: a[i : i + 1], batch)
        grads, terms = sound[step, "gradients"](state, one, hyper, config, controller, n_domains, placement)
        bias = sound[step, "move_bias"](state.bias, terms.load_LE, hyper.bias_update_speed, config, controller)
        state = state._replace(bias=bias)
    return sound[step, "gradients"](state, batch, hyper, config, controller, n_domains, placement)


def count_twice_when_recomputing(params, bias_LE, batch, config, summary, extras_L, placement=None):
    main, depths, layers = sound[objective, "run_model"](params, bias_LE, batch, config, summary, extras_L, placement)
    return main, depths, layers if config.model.remat == "none" else (2 * layers[0], *layers[1:])


def bfloat16_counts(bias_E, load_E, speed):
    load = load_E.astype(jnp.bfloat16)
    return bias_E + speed * jnp.sign(load.mean() - load).astype(jnp.float32)


def float32_counts(bias_E, load_E, speed):
    load = load_E.astype(jnp.float32)
    return bias_E + speed * jnp.sign(load.mean() - load)


def bfloat16_bias(bias_E, load_E, speed):
    return balance.sign_step(bias_E, load_E, speed).astype(jnp.bfloat16).astype(jnp.float32)


def sign_with(move_bias):
    return lambda: balance.Controller(move_bias=move_bias, loss=balance.sequence_loss, alpha=1e-4)


# 3: the mesh ----------------------------------------------------------------------------------------------------------


def counts_of_one_rank(tree, placement):
    """Each rank's own counts, of which the first rank's are kept; losses are summed as they should be."""
    whole = sound[step, "sum_over_batch"](tree, placement)
    if placement is None or not hasattr(tree, "load_LE"):
        return whole
    first = jnp.where(jax.lax.axis_index(placement.batch_axes) == 0, tree.load_LE, 0)
    return whole._replace(load_LE=sound[step, "sum_over_batch"](first, placement))


def counts_of_one_expert_group(tree, placement):
    """Summed over the expert ranks, but not over the replicas beside them."""
    whole = sound[step, "sum_over_batch"](tree, placement)
    if placement is None or not hasattr(tree, "load_LE"):
        return whole
    first = jnp.where(jax.lax.axis_index("data") == 0, tree.load_LE, 0)
    return whole._replace(load_LE=sound[step, "sum_over_batch"](first, placement))


def averaged_over_ranks(gradients, specs, placement):
    whole = sound[step, "reduced"](gradients, specs, placement)
    return jax.tree.map(lambda g: g / placement.batch_ranks, whole) if placement else whole


def totals_of_one_rank(field):
    """A term divided by the rank's own total and so counted once for every rank."""

    def faulty(batch, config, placement=None):
        whole, own = (sound[step, "batch_totals"](batch, config, p) for p in (placement, None))
        return whole._replace(**{field: getattr(own, field)})

    return faulty


# 5, 6, 7, 9, 10: the router -------------------------------------------------------------------------------------------


def rebuilt_route(*, gate_scores="unbiased", cast=None, fill=None):
    """The router written out again, with one fault."""

    def faulty(x, weight_DE, bias_E, config):
        if cast is not None:
            x, weight_DE = x.astype(cast), weight_DE.astype(cast)
        logits = (x.astype(weight_DE.dtype) @ weight_DE).astype(jnp.float32)
        scores = router.SCORE_FUNCTIONS[config.scoring_func](logits)
        biased = scores + bias_E.reshape((1,) * (scores.ndim - 1) + (-1,))
        eligible = router.SELECTORS[config.topk_method](biased, config)
        if fill is not None:
            eligible = jnp.where(eligible == -jnp.inf, jnp.float32(fill), eligible)
        k = config.num_experts_per_tok
        values, order = jax.lax.top_k(eligible, min(k + 1, config.n_routed_experts))
        full = jnp.full(values.shape[:-1], jnp.inf)
        margin = values[..., k - 1] - values[..., k] if k < config.n_routed_experts else full
        used = {"unbiased": scores, "biased": biased, "recovered": biased - bias_E.reshape((1,) * (scores.ndim - 1) + (-1,))}
        chosen = sound[router, "gates"](used[gate_scores], order[..., :k], config)
        return router.Routing(order[..., :k], chosen, scores, logits, margin)

    return faulty


def products_of_everything(config, operation):
    """The precision table without its exception for the router."""
    recipe = config.fp8 and dataclasses.replace(config.fp8, router=True)
    return precision.products(dataclasses.replace(config, fp8=recipe), operation)


def grouped_by(score):
    """Node-limited selection with another score of a group: `score(grouped, config)` [..., G]."""

    def faulty(biased, config):
        if config.topk_group == config.n_group:
            return biased
        grouped = biased.reshape(*biased.shape[:-1], config.n_group, -1)
        kept = jax.lax.top_k(score(grouped, config), config.topk_group)[1]
        is_kept = (kept[..., None] == jnp.arange(config.n_group).reshape((1,) * kept.ndim + (-1,))).any(axis=-2)
        return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(biased.shape)

    return faulty


def group_maximum(grouped, config):
    return grouped.max(axis=-1)


def group_sum_of_k_over_kept(grouped, config):
    return jax.lax.top_k(grouped, max(1, config.num_experts_per_tok // config.topk_group))[0].sum(axis=-1)


def route_with_unbiased_groups(x, weight_DE, bias_E, config):
    """Groups are kept by their unbiased scores, experts within them chosen by the biased ones."""
    bias = bias_E.reshape((1,) * (x.ndim - 1) + (-1,))

    def selector(biased, config):
        return jnp.where(router.group_limited(biased - bias, config) == -jnp.inf, -jnp.inf, biased)

    held = dict(router.SELECTORS)
    router.SELECTORS["noaux_tc"] = selector
    try:
        return sound[router, "route"](x, weight_DE, bias_E, config)
    finally:
        router.SELECTORS.update(held)


def gates_without_scale(scores, indices, config):
    return sound[router, "gates"](scores, indices, config) / config.routed_scaling_factor


def gates_scaled_twice(scores, indices, config):
    return sound[router, "gates"](scores, indices, config) * config.routed_scaling_factor


# 8: the balance loss ---------------------------------------------------------------------------------------------------


def sequence_loss_by_softmax(routing, scope, config):
    return balance.sequence_loss(routing._replace(scores=jax.nn.softmax(routing.logits, axis=-1)), scope, config)


def sequence_loss_unnormalised(routing, scope, config):
    return balance.sequence_loss(routing, scope, config) * routing.scores.sum(axis=-1).mean()


def sequence_loss_over_batch(routing, scope, config):
    load = balance.count_load(routing.indices, scope.valid_BT, config.n_routed_experts)
    return balance.batch_loss(routing, scope._replace(load_E=load), config)


def sequence_loss_counting_empty_rows(routing, scope, config):
    return balance.sequence_loss(routing, scope._replace(sequences=jnp.float32(scope.valid_BT.shape[0])), config)


def with_loss(loss, alpha=1e-4):
    """Named `sequence` and `sign` alike: whichever the check asks for."""
    return lambda: balance.Controller(move_bias=balance.sign_step, loss=loss, alpha=alpha)


# 11: multi-token prediction --------------------------------------------------------------------------------------------


def shifted_one_less(values, k):
    return sound[mtp, "shifted"](values, max(k - 1, 0))


def shifted_one_more(values, k):
    return sound[mtp, "shifted"](values, k + 1)


def targets_across_documents(segments, k):
    return (segments[:, :-1] != 0) & (sound[mtp, "shifted"](segments, k + 1)[:, :-1] != 0)


def module_without_shift(params, bias_E, hidden, embedding, context, config, forced_BTK=None):
    """Position i joins token i's embedding instead of token i+1's."""
    return sound[mtp, "module"](params, bias_E, hidden, jnp.roll(embedding, 1, axis=1), context, config)


def uninitialised_head(params, batch, hidden, config, placement=None):
    fresh = 0.006 * jax.random.normal(jax.random.key(3), params["lm_head"].shape)
    main = sound[objective, "depth_losses"](params, batch, hidden[:1], config, placement)
    own = sound[objective, "depth_losses"](params | {"lm_head": fresh}, batch, hidden, config, placement)
    return [*main, *own[1:]]


def skipped_weights(params, bias_E, hidden, embedding, context, config, forced_BTK=None):
    """The layer number of the module was not in the loader's table: its projection stays as initialised."""
    return sound[mtp, "module"](params | {"eh_proj": params["eh_proj"] * 0.1}, bias_E, hidden, embedding, context, config)


def module_with_swapped_halves(params, bias_E, hidden, embedding, context, config, forced_BTK=None):
    return sound[mtp, "module"](params, bias_E, embedding, hidden, context, config)


# 12: rotary embedding --------------------------------------------------------------------------------------------------


def half_rotated(x, cos, sin):
    left, right = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def rotated_backwards(x, cos, sin):
    return sound[mla, "apply_rope"](x, cos, -sin) if x.shape[1] > 1 else sound[mla, "apply_rope"](x, cos, sin)


def unpermuted_output(x, cos, sin):
    """Rotates interleaved pairs but hands them back in halves: harmless for scores unless only the queries get it."""
    rotated = sound[mla, "apply_rope"](x, cos, sin)
    return jnp.concatenate([rotated[..., 0::2], rotated[..., 1::2]], axis=-1) if x.shape[1] > 1 else rotated


def scale_without_mscale(config):
    return (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5


def scale_with_mscale_once(config):
    plain = scale_without_mscale(config)
    return plain * (sound[mla, "softmax_scale"](config) / plain) ** 0.5


def frequencies_without_yarn(config):
    return sound[rope, "rope_frequencies"](dataclasses.replace(config, rope_scaling=None))


def frequencies_all_interpolated(config):
    plain = frequencies_without_yarn(config)
    return plain if config.rope_scaling is None else plain / config.rope_scaling.factor


# 11, 12, 13: the loader ------------------------------------------------------------------------------------------------


def fill_layer_61_alone(source, leaf, out, index):
    """The module is looked for under V3's own number, and without it stays empty."""
    sound[read, "_fill"](source, leaf, out, index)
    if leaf.path.startswith("mtp.") and leaf.first_layer != 61:
        out[...] = 0


def fill_with_first_mtp_layer(source, leaf, out, index):
    """Every depth gets the first module's weights."""
    sound[read, "_fill"](source, leaf, out, index)
    if leaf.path.startswith("mtp."):
        out[...] = out[:1]


def fill_in_halves(out, leaf, released, scale, sides):
    """The rotary rows of each head sorted into halves, for a rotation that turns pairs."""
    sound[read, "fill_matrix"](out, leaf, released, scale, sides)
    if leaf.path.endswith(("q_b_proj", "q_proj")):
        out[..., -6:] = np.concatenate([out[..., -6::2], out[..., -5::2]], axis=-1)


def fill_without_scale(out, leaf, released, scale, sides):
    sound[read, "fill_matrix"](out, leaf, released, None, sides)


def fill_with_neighbours_scale(out, leaf, released, scale, sides):
    """Blocks at the edges take the scale of the whole block before them."""
    if scale is not None:
        edges = [size % 128 != 0 and -(-size // 128) > 1 for size in released.shape]
        scale = np.array(scale)
        if edges[0]:
            scale[-1] = scale[-2]
        if edges[1]:
            scale[:, -1] = scale[:, -2]
    sound[read, "fill_matrix"](out, leaf, released, scale, sides)


def fill_with_shared_scale(out, leaf, released, scale, sides):
    """Blocks counted from the bottom: right only where 128 divides the rows."""
    if scale is not None and released.shape[0] > 128:
        rows = (np.arange(released.shape[0]) + -released.shape[0] % 128) // 128
        spread = np.asarray(scale, np.float32)[rows][:, np.arange(released.shape[1]) // 128]
        released, scale = released.astype(np.float32) * spread, None
    sound[read, "fill_matrix"](out, leaf, released, scale, sides)


# 14: accumulation --------------------------------------------------------------------------------------------------------


def scaled_share(term):
    """The `term` of the objective is divided by each micro-batch's own count, and so counts once per micro-batch."""

    def faulty(params, bias_LE, batch, totals, mtp_weight, config, controller, n_domains, placement=None):
        own = objective.batch_totals(batch, config)
        fixed = {
            "mtp": {"targets_Q": totals.targets_Q.at[1:].set(own.targets_Q[1:])},
            "main": {"targets_Q": totals.targets_Q.at[0].set(own.targets_Q[0])},
            "balance": {"sequences_L": own.sequences_L},
        }
        changed = totals._replace(**fixed[term])
        return sound[step, "objective"](params, bias_LE, batch, changed, mtp_weight, config, controller, n_domains, placement)

    return faulty


def mtp_gradient_doubled(params, bias_LE, batch, totals, mtp_weight, config, controller, n_domains, placement=None):
    """The value is right, the gradient of MTP's term is scaled by the number of micro-batches."""
    args = (config, controller, n_domains, placement)
    loss, terms = sound[step, "objective"](params, bias_LE, batch, totals, mtp_weight, *args)
    excess = loss - sound[step, "objective"](params, bias_LE, batch, totals, 0 * mtp_weight, *args)[0]
    return loss + excess - jax.lax.stop_gradient(excess), terms


def balance_gradient_doubled(params, bias_LE, batch, totals, mtp_weight, config, controller, n_domains, placement=None):
    loss, terms = sound[step, "objective"](params, bias_LE, batch, totals, mtp_weight, config, controller, n_domains, placement)
    excess = (
        loss
        - sound[step, "objective"](
            params, bias_LE, batch, totals, mtp_weight, config, controller._replace(alpha=0.0), n_domains, placement
        )[0]
    )
    return loss + excess - jax.lax.stop_gradient(excess), terms
