"""Checks of a training step against the float64 objective of the whole batch; run by the step's tests, and by the mutants."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Config, DataConfig, ParallelConfig, TrainConfig
from dsv3_jax.moe.balance import controller_of
from dsv3_jax.parallel.collectives import BATCH_SPEC, Placement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import step as training
from dsv3_jax.training.optimizer import init_optimizer
from oracles import numpy_moe
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config, released_gradients
from oracles.numpy_objective import objective
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors

DOMAINS = 2
MTP_WEIGHT = 0.7  # not small, so that a term that is lost or scaled shows
RELEASED = SMALL_CONFIG | {"num_nextn_predict_layers": 1}
PLAIN = SMALL_CONFIG | {"num_hidden_layers": 1, "first_k_dense_replace": 0, "attention": "mha"}
HYPER = training.Hyper(*(jnp.float32(value) for value in (1e-3, 2**-8, MTP_WEIGHT)))


def rows(*, length: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Four rows [4, length + 1]: two documents; one with padding behind; one whole; and nothing but padding."""
    rng = np.random.default_rng(seed)
    segments = np.ones((4, length + 1), np.int32)
    segments[0, 4:] = 2
    segments[1, 3:5], segments[1, 5:] = 2, 0
    segments[3] = 0
    live = segments != 0
    tokens = rng.integers(0, SMALL_CONFIG["vocab_size"], segments.shape).astype(np.int32) * live
    domains = (rng.integers(0, DOMAINS, segments.shape) * live).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "domain_ids": domains}


def cut(batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, jax.Array]:
    return {name: jnp.asarray(a.reshape(micro_batches, -1, a.shape[-1])) for name, a in batch.items()}


def step_config(released: dict[str, Any], *, model: dict[str, Any] | None = None, **train: Any) -> Config:
    """Strong balance loss, and a loss in several chunks."""
    defaults: dict[str, Any] = dict(
        steps=10, batch_size=4, batch_size_start=4, aux_loss_alpha=0.05, loss_chunk_elements=400, moment_dtype="float32"
    )
    return Config(
        model=model_config(released, **model or {}),
        train=TrainConfig(**defaults | train),
        data=DataConfig(seq_len=7, cross_document_attention=False),
    )


def state_of(tensors: dict[str, np.ndarray], config: Config) -> training.TrainState:
    params, bias = from_checkpoint(tensors, config.model)
    zero = jnp.zeros((), jnp.int32)
    return training.TrainState(params, init_optimizer(config.train, params), bias, zero, zero.copy(), zero.copy())


def run_gradients(
    config: Config, tensors: dict[str, np.ndarray], batch: dict[str, np.ndarray], micro_batches: int, ranks: int = 1
) -> Any:
    """(gradients, Terms) of a step cut into so many micro-batches, on the mesh of `config` over so many devices."""
    controller, state, rows_ = controller_of(config), state_of(tensors, config), cut(batch, micro_batches)
    placement = None
    if ranks > 1:
        placement = Placement(make_mesh(config, jax.devices()[:ranks]), config.parallel)
        state = jax.device_put(state, training.state_shardings(config, placement))
        rows_ = jax.device_put(rows_, placement.sharding(BATCH_SPEC))
    run = partial(training.gradients, config=config, controller=controller, n_domains=DOMAINS, placement=placement)
    return quick_jit(run)(state, rows_, HYPER)


def check_step_equals_the_reference(
    released: dict[str, Any] = RELEASED,
    *,
    micro_batches: int = 2,
    balance: str = "sequence",
    model: Any = None,
    mesh: ParallelConfig | None = None,
    ranks: int = 1,
    **train: Any,
) -> None:
    """Every term, every count, and the gradient along a random direction, of ragged rows in so many micro-batches."""
    config = step_config(released, model=model, **train)
    config = dataclasses.replace(config, parallel=mesh or ParallelConfig())
    tensors, batch = random_tensors(released, seed=1), rows()
    if config.model.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    gradients, terms = run_gradients(config, tensors, batch, micro_batches, ranks)

    alpha = controller_of(config).alpha
    options = dict(mtp_weight=MTP_WEIGHT, alpha=alpha, balance=balance, n_domains=DOMAINS,
                   balance_mtp=config.train.balance_mtp, reduction=config.train.aux_loss_reduction)  # fmt: skip
    expected = objective(tensors, released, batch, **options)
    assert expected["margin"] > 1e-4
    np.testing.assert_array_equal(terms.load_LE, expected["load"])
    np.testing.assert_array_equal(terms.domain_targets_M, expected["domain_tokens"])
    actual = {"loss": terms.loss, "main_loss": terms.depth_loss_Q[0], "balance_loss": terms.balance_loss}
    if len(terms.depth_loss_Q) > 1:
        actual["mtp_loss"] = terms.depth_loss_Q[1:].mean()
    for name, value in actual.items():  # losses of order 4, of which the balance is 0.1
        assert abs(float(value) - expected[name]) < 1e-5 * max(1.0, abs(expected[name])), (name, value, expected[name])
    np.testing.assert_allclose(terms.domain_loss_M, expected["domain_loss_sum"], rtol=3e-6)

    # Slope along directions that touch every tensor; the reference's by central differences, good to 1e-8 here.
    rng = np.random.default_rng(9)
    names = [n for n in tensors if "bias" not in n and not (config.model.tie_word_embeddings and n == "lm_head.weight")]
    released_grads = released_gradients(gradients, tensors, config.model)
    for _ in range(2):
        direction = {n: rng.standard_normal(tensors[n].shape) * tensors[n].std() for n in names}

        def along(distance: float, direction: dict[str, np.ndarray] = direction) -> float:
            moved = tensors | {n: tensors[n] + distance * d for n, d in direction.items()}
            if config.model.tie_word_embeddings:
                moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
            return objective(moved, released, batch, **options)["loss"]

        slope = (along(1e-6) - along(-1e-6)) / 2e-6
        ours = sum(float((released_grads[n].astype(np.float64) * d).sum()) for n, d in direction.items())
        size = sum(float(np.square(released_grads[n].astype(np.float64) * tensors[n].std()).sum()) for n in names) ** 0.5
        assert abs(ours - slope) < 2e-5 * size + 1e-6, (ours, slope)


def check_step_on_a_mesh_equals_the_reference() -> None:
    """One row on each of 2 x 2 ranks; expert parallel, the state in pieces."""
    mesh = ParallelConfig(layout="report", mesh_expert=2, mesh_data=2)
    check_step_equals_the_reference(micro_batches=1, mesh=mesh, ranks=4)


def check_step_in_micro_batches_on_a_mesh_equals_the_reference() -> None:
    check_step_equals_the_reference(mesh=ParallelConfig(layout="fully_sharded"), ranks=2, model={"remat": "full"})


def check_bias_moves_once_a_step_by_the_speed(micro_batches: int = 2) -> None:
    """From a whole step: every bias by speed * sign(load error), whatever the number of micro-batches; parameters move too."""
    config = step_config(PLAIN)
    tensors, batch = random_tensors(PLAIN, seed=1), rows()
    state = state_of(tensors, config)
    run = partial(training.train_step, config=config, controller=controller_of(config), n_domains=DOMAINS)
    new, metrics = quick_jit(run)(state, cut(batch, micro_batches), HYPER)
    load = objective(tensors, PLAIN, batch, mtp_weight=0.0, alpha=0.0)["load"]
    np.testing.assert_array_equal(metrics["load"], load)
    before, speed = np.asarray(state.bias[0]), np.float32(2**-8)
    np.testing.assert_array_equal(new.bias[0], before + speed * np.sign(load[0].mean() - load[0]).astype(np.float32))
    expected = numpy_moe.sign_bias_update(before.astype(np.float64), load[0], 2**-8)
    np.testing.assert_allclose(new.bias[0], expected, rtol=0, atol=1e-7)
    assert int(new.step) == 1 and not bool(metrics["nonfinite"])
    assert all(bool((a != b).any()) for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params), strict=True))


def check_rematerialisation_changes_no_count_and_no_loss() -> None:
    """Of the gradient step: recomputation runs the routers twice and counts them once."""
    tensors, batch = random_tensors(PLAIN, seed=1), rows()
    results = {}
    for remat in ("none", "full"):
        config = step_config(PLAIN, model={"remat": remat})
        results[remat] = run_gradients(config, tensors, batch, 1)
    for name in ("load_LE", "domain_targets_M"):
        np.testing.assert_array_equal(getattr(results["none"][1], name), getattr(results["full"][1], name))
    expected = objective(tensors, PLAIN, batch, mtp_weight=0.0, alpha=0.0)["load"]
    np.testing.assert_array_equal(results["full"][1].load_LE, expected)
    np.testing.assert_allclose(results["none"][1].loss, results["full"][1].loss, rtol=1e-6)


def with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
