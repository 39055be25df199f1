"""The objective's terms, counts and gradient against float64, for any cut into micro-batches and each of its choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training.objective import batch_totals, by_domain, counted_tokens
from oracles import checks_step
from oracles.checks_step import PLAIN, RELEASED, check_step_equals_the_reference, rows, step_config
from oracles.numpy_model import aligned_targets, cross_entropy, forward
from oracles.random_checkpoint import random_tensors


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ragged_micro_batches_add_up_to_the_objective_of_the_whole_batch(micro_batches):
    """With 4 the last micro-batch is nothing but padding, and the second has half the targets of the first."""
    check_step_equals_the_reference(micro_batches=micro_batches)


@pytest.mark.parametrize("controller, balance", [("batch", "batch"), ("classical", "classical"), ("sequence", "sequence")])
def test_losses_over_the_whole_batch_are_counted_before_they_are_cut(controller, balance):
    check_step_equals_the_reference(PLAIN, micro_batches=4, balance=balance, controller=controller)


@pytest.mark.slow
def test_a_batch_wise_loss_needs_no_counting_pass_for_one_micro_batch():
    check_step_equals_the_reference(PLAIN, micro_batches=1, balance="batch", controller="batch")


def test_mean_over_layers_leaves_mtp_out_where_it_is_not_balanced():
    check_step_equals_the_reference(micro_batches=1, balance_mtp=False, aux_loss_reduction="mean")


@pytest.mark.slow
def test_mean_over_layers_takes_mtp_in_where_it_is_balanced():
    check_step_equals_the_reference(micro_batches=1, aux_loss_reduction="mean")


def test_tied_embedding_gathers_the_gradients_of_both_its_uses():
    tied = PLAIN | {"tie_word_embeddings": True}
    check_step_equals_the_reference(tied, micro_batches=1)


def test_counted_tokens_are_all_but_padding_and_in_mtp_those_with_a_target():
    batch = {name: jnp.asarray(a) for name, a in rows().items()}
    config = step_config(RELEASED)
    main, mtp = counted_tokens(batch, config)
    np.testing.assert_array_equal(main, np.asarray(batch["segment_ids"])[:, :-1] != 0)
    np.testing.assert_array_equal(mtp[0], [True, True, False, False, True, True, False])
    totals = batch_totals(batch, config)
    assert totals.sequences_L.tolist() == [3.0, 3.0] and totals.tokens_L.tolist() == [19.0, 11.0]
    assert totals.targets_Q.tolist() == [16.0, 11.0] and totals.load_LE is None


def test_nats_are_booked_on_the_domain_of_the_target():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]], jnp.int32)
    domains = jnp.asarray([[0, 1, 1, 0, 1, 0]], jnp.int32)
    batch = {"tokens": jnp.zeros_like(segments), "segment_ids": segments, "domain_ids": domains}
    nll = jnp.asarray([[1.0, 2.0, 0.0, 4.0, 0.0]])
    sums, targets = by_domain(batch, nll, 2)
    assert sums.tolist() == [0.0, 7.0] and targets.tolist() == [0, 3]


def test_all_dense_model_has_an_objective_without_router():
    dense = PLAIN | {"first_k_dense_replace": 1}
    config = step_config(dense)
    tensors, batch = random_tensors(dense, seed=1), rows()
    gradients, terms = checks_step.run_gradients(config, tensors, batch, 2)
    main = forward(tensors, dense, batch["tokens"][:, :-1], batch["segment_ids"][:, :-1])
    loss = cross_entropy(main["logits"], *aligned_targets(batch["tokens"], 7, 0, batch["segment_ids"]))
    assert float(terms.loss) == pytest.approx(loss, rel=3e-6) and terms.load_LE.shape == (0, 8)
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(gradients))
