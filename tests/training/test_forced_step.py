"""A training step whose batch says which experts to use: `batch["forced"]` [A, B, T, L, K], on one device and on a mesh."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ParallelConfig
from dsv3_jax.moe.balance import controller_of
from dsv3_jax.parallel.collectives import BATCH_SPEC, Placement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import step as training
from oracles import numpy_model, numpy_objective
from oracles.checks_step import DOMAINS, HYPER, MTP_WEIGHT, RELEASED, rows, state_of, step_config
from oracles.compiling import quick_jit
from oracles.from_checkpoint import released_gradients
from oracles.jaxprs import equations
from oracles.random_checkpoint import random_tensors

EXPERTS, TOP_K, LAYERS = RELEASED["n_routed_experts"], RELEASED["num_experts_per_tok"], 2  # one of them MTP's
FREE = np.full((*rows()["tokens"][:, 1:].shape, LAYERS, TOP_K), EXPERTS, np.int32)
# A loss over the whole batch's load: it takes a counting pass before the gradients.
SETTINGS = dict(controller="batch", aux_loss_alpha=0.05)


def any_experts(seed):
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((*FREE.shape[:-1], EXPERTS)), axis=-1)[..., :TOP_K].astype(np.int32)


def by_layer(forced):
    return dict(enumerate(np.moveaxis(forced, 2, 0), start=RELEASED["first_k_dense_replace"]))


def own_experts(tensors):
    """What every router chooses by itself, in the order of `forced`, from the float64 model."""
    batch = rows()
    tokens, segments = batch["tokens"], batch["segment_ids"]
    main = numpy_model.forward(tensors, RELEASED, tokens[:, :-1], segments[:, :-1])
    (module,) = numpy_model.mtp_forward(tensors, RELEASED, main, tokens, segments)
    chosen = [*main["routing"].values(), module["routing"]]
    return np.stack([routing["indices"] for routing in chosen], axis=2).astype(np.int32)


def reference(monkeypatch, tensors, forced):
    """The float64 objective with these experts."""
    with monkeypatch.context() as patch:
        for name in ("forward", "mtp_forward"):
            patch.setattr(numpy_model, name, partial(getattr(numpy_model, name), forced=by_layer(forced)))
        return numpy_objective.objective(
            tensors, RELEASED, rows(), mtp_weight=MTP_WEIGHT, alpha=0.05, balance="batch", n_domains=DOMAINS
        )


def batch_with(forced, micro_batches):
    batch = rows() | ({} if forced is None else {"forced": forced})
    return {name: jnp.asarray(a.reshape(micro_batches, -1, *a.shape[1:])) for name, a in batch.items()}


@functools.cache
def compiled(ranks=1, micro_batches=2):
    """`(tensors, forced) -> (gradients, Terms)`, one program, on a mesh with a row for each of 2 x 2 ranks if four."""
    config, placement = step_config(RELEASED, **SETTINGS), None
    if ranks > 1:
        parallel = ParallelConfig(layout="report", mesh_expert=2, mesh_data=2)
        config = dataclasses.replace(config, parallel=parallel)
        placement = Placement(make_mesh(config, jax.devices()[:ranks]), parallel)
    run = quick_jit(
        partial(training.gradients, config=config, controller=controller_of(config), n_domains=DOMAINS, placement=placement)
    )

    def gradients(tensors, forced):
        state, batch = state_of(tensors, config), batch_with(forced, micro_batches)
        if placement is not None:
            state = jax.device_put(state, training.state_shardings(config, placement))
            batch = jax.device_put(batch, placement.sharding(BATCH_SPEC))
        found = jax.tree.map(np.asarray, run(state, batch, HYPER))
        assert run._cache_size() == 1  # bitwise comparisons are of one program
        return found

    return config, gradients


def assert_equal_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def moved(tensors):
    """Every router somewhere else: it would choose otherwise."""
    rng = np.random.default_rng(7)
    return {n: t + (rng.standard_normal(t.shape) * t.std() if "mlp.gate" in n else 0) for n, t in tensors.items()}


def test_a_step_forced_to_its_own_experts_is_the_step_to_the_last_bit_and_other_weights_keep_its_counts():
    config, run = compiled()
    tensors = random_tensors(RELEASED, seed=1)
    own = own_experts(tensors)
    first = run(tensors, FREE)
    assert_equal_bits(run(tensors, own), first)
    elsewhere, counts = moved(tensors), first[1].load_LE
    assert (run(elsewhere, FREE)[1].load_LE != counts).any()
    np.testing.assert_array_equal(run(elsewhere, own)[1].load_LE, counts)


def test_a_forced_step_equals_the_float64_objective_with_these_experts_router_gradients_included(monkeypatch):
    config, run = compiled()
    tensors, forced = random_tensors(RELEASED, seed=1), any_experts(3)
    forced[::2, ::2] = EXPERTS  # some free
    gradients, terms = run(tensors, forced)
    expected = reference(monkeypatch, tensors, forced)
    np.testing.assert_array_equal(terms.load_LE, expected["load"])
    assert abs(float(terms.balance_loss) - expected["balance_loss"]) < 1e-6  # of order 0.1
    for actual, name in ((terms.loss, "loss"), (terms.depth_loss_Q[0], "main_loss"), (terms.depth_loss_Q[1], "mtp_loss")):
        assert abs(float(actual) - expected[name]) < 1e-5 * expected[name], name  # some hundred roundings of order 4

    released = released_gradients(gradients, tensors, config.model)
    rng = np.random.default_rng(9)
    gates = [name for name in tensors if name.endswith("mlp.gate.weight")]
    assert len(gates) == LAYERS
    for name in gates:  # by central differences, each router apart
        direction = rng.standard_normal(tensors[name].shape) * tensors[name].std()
        ends = [reference(monkeypatch, tensors | {name: tensors[name] + d * direction}, forced)["loss"] for d in (1e-5, -1e-5)]
        slope, ours = (ends[0] - ends[1]) / 2e-5, float((released[name].astype(np.float64) * direction).sum())
        size = float(np.linalg.norm(released[name].astype(np.float64))) * tensors[name].std()
        assert abs(slope) > 0.05 * size and abs(ours - slope) < 1e-4 * size, (name, ours, slope, size)


def test_a_forced_step_on_a_mesh_is_that_of_one_device_and_its_replay_is_bitwise():
    _, alone = compiled(1, 1)
    _, run = compiled(4, 1)
    tensors = random_tensors(RELEASED, seed=1)
    forced = any_experts(3)
    (gradients, terms), (expected, expected_terms) = run(tensors, forced), alone(tensors, forced)
    np.testing.assert_array_equal(terms.load_LE, expected_terms.load_LE)

    def error(a, b):
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    errors = jax.tree.map(error, (gradients, terms.loss), (expected, expected_terms.loss))
    assert max(jax.tree.leaves(errors)) < 5e-6, errors  # sums in another order, as in tests/parallel/test_invariance.py
    assert_equal_bits(run(tensors, FREE), run(tensors, own_experts(tensors)))


def test_evaluation_counts_the_experts_that_it_is_forced_to(monkeypatch):
    config, tensors, forced = step_config(RELEASED), random_tensors(RELEASED, seed=1), any_experts(3)
    state = state_of(tensors, config)
    sums = quick_jit(training.make_eval_step(config, DOMAINS))(state.params, state.bias, batch_with(forced, 2))
    expected = reference(monkeypatch, tensors, forced)
    np.testing.assert_array_equal(sums["load"], expected["load"])
    np.testing.assert_allclose(sums["domain_loss_sum"], expected["domain_loss_sum"], rtol=3e-6)


def test_a_step_without_forced_experts_holds_nothing_of_them():
    """Choices by select, where the router's own come from a top-k: in the program of a forced step, and in no other."""
    config = step_config(RELEASED)
    run = partial(training.gradients, config=config, controller=controller_of(config), n_domains=DOMAINS)

    def selects(forced):
        program = jax.make_jaxpr(run)(training.abstract_state(config), batch_with(forced, 1), HYPER)
        found = [e.outvars[0].aval for e in equations(program) if e.primitive.name == "select_n"]
        return sum(a.shape == FREE[:, :, 0].shape and a.dtype == jnp.int32 for a in found)

    assert selects(FREE) >= LAYERS and selects(None) == 0
