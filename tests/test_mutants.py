"""Faults that other implementations shipped, put into ours one at a time: the check that an ordinary test runs must fail.

Each check is the function that the test of the same name calls, so a mutant that survives means that this test is weak. Checks
compile afresh (`quick_jit`), so nothing compiled from the sound code is reused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

import dsv3_jax.interop.read as read
import dsv3_jax.model.mla as mla
import dsv3_jax.model.mtp as mtp
import dsv3_jax.model.rope as rope
import dsv3_jax.moe.balance as balance
import dsv3_jax.moe.layer as layer
import dsv3_jax.moe.router as router
import dsv3_jax.training.objective as objective
import dsv3_jax.training.step as step
from oracles import checks_attention, checks_balance, checks_loader, checks_mtp, checks_router, checks_step, faults


class Mutant(NamedTuple):
    bug: str  # number in the list of known bugs, and what is wrong
    check: Callable[[], None]
    patches: list[tuple[Any, str, Any]]  # (module or dict, name, faulty copy)


# The table -----------------------------------------------------------------------------------------------------------------

STEP = checks_step.check_step_equals_the_reference
MESH = checks_step.check_step_on_a_mesh_equals_the_reference
MESH_MICRO = checks_step.check_step_in_micro_batches_on_a_mesh_equals_the_reference
BIAS = checks_step.check_bias_moves_once_a_step_by_the_speed
REMAT = checks_step.check_rematerialisation_changes_no_count_and_no_loss
CONTROLLERS, SELECTORS, SCORES = balance.CONTROLLERS, router.SELECTORS, router.SCORE_FUNCTIONS


def plain_step() -> None:
    STEP(checks_step.PLAIN)


def mla_with_yarn() -> None:
    checks_attention.check_attention_equals_the_reference("mla_yarn")


MUTANTS = [
    Mutant("1 the step leaves the bias alone", BIAS, [(step, "move_bias", faults.frozen_bias)]),
    Mutant("1 the controller leaves the bias alone", checks_balance.check_known_balance,
           [(CONTROLLERS, "sign", faults.sign_with(lambda bias, load, speed: bias))]),
    Mutant("1 the bias moves towards the load", checks_balance.check_known_balance,
           [(CONTROLLERS, "sign", faults.sign_with(faults.reversed_sign))]),
    Mutant("2 counts of the last micro-batch only", BIAS, [(step, "gradients", faults.gradients_with_last_counts)]),
    Mutant("2 bias moved between micro-batches", BIAS, [(step, "gradients", faults.gradients_with_bias_moved_per_micro_batch)]),
    Mutant("2 counts doubled by recomputation", REMAT, [(objective, "run_model", faults.count_twice_when_recomputing)]),
    Mutant("2 padding counted", checks_balance.check_counts_leave_padding_out, [(balance, "count_load", faults.count_padding)]),
    Mutant("2 padding counted by the step", plain_step, [(objective, "count_load", faults.count_padding)]),
    Mutant("3 counts of one rank", MESH, [(step, "sum_over_batch", faults.counts_of_one_rank)]),
    Mutant("3 counts of one expert group", MESH, [(step, "sum_over_batch", faults.counts_of_one_expert_group)]),
    Mutant("2 counts doubled by recomputation on a mesh", MESH_MICRO,
           [(objective, "run_model", faults.count_twice_when_recomputing)]),
    Mutant("14 gradients averaged over ranks", MESH, [(step, "reduced", faults.averaged_over_ranks)]),
    Mutant("14 MTP divided by a rank's targets", MESH, [(step, "batch_totals", faults.totals_of_one_rank("targets_Q"))]),
    Mutant("14 balance divided by a rank's sequences", MESH,
           [(step, "batch_totals", faults.totals_of_one_rank("sequences_L"))]),
    Mutant("14 balance divided by a micro-batch's sequences on a mesh", MESH_MICRO,
           [(step, "objective", faults.scaled_share("balance"))]),
    Mutant("4 counts in bfloat16", checks_balance.check_sign_is_exact_at_large_counts,
           [(CONTROLLERS, "sign", faults.sign_with(faults.bfloat16_counts))]),
    Mutant("4 counts in float32", checks_balance.check_sign_is_exact_at_large_counts,
           [(CONTROLLERS, "sign", faults.sign_with(faults.float32_counts))]),
    Mutant("4 bias in bfloat16", checks_balance.check_bias_keeps_small_steps,
           [(CONTROLLERS, "sign", faults.sign_with(faults.bfloat16_bias))]),
    Mutant("5 gates from biased scores", checks_router.check_known_choices,
           [(router, "route", faults.rebuilt_route(gate_scores="biased"))]),
    Mutant("5 scores recovered from biased ones", checks_router.check_gates_are_free_of_the_bias,
           [(router, "route", faults.rebuilt_route(gate_scores="recovered"))]),
    Mutant("6 dropped groups filled with 0", checks_router.check_negative_scores_of_kept_groups,
           [(router, "route", faults.rebuilt_route(fill=0.0))]),
    Mutant("6 dropped groups filled with 0, random biases", checks_router.check_all_random_choices,
           [(router, "route", faults.rebuilt_route(fill=0.0))]),
    Mutant("7 group score is the maximum", checks_router.check_known_choices,
           [(SELECTORS, "noaux_tc", faults.grouped_by(faults.group_maximum))]),
    Mutant("7 group score sums K / kept experts", checks_router.check_all_random_choices,
           [(SELECTORS, "noaux_tc", faults.grouped_by(faults.group_sum_of_k_over_kept))]),
    Mutant("7 group score unbiased", checks_router.check_known_choices, [(router, "route", faults.route_with_unbiased_groups)]),
    Mutant("8 softmax instead of normalised sigmoid", checks_balance.check_losses_equal_the_reference,
           [(CONTROLLERS, "sequence", faults.with_loss(faults.sequence_loss_by_softmax))]),
    Mutant("8 scores not normalised", checks_balance.check_losses_equal_the_reference,
           [(CONTROLLERS, "sequence", faults.with_loss(faults.sequence_loss_unnormalised))]),
    Mutant("8 over the batch", checks_balance.check_losses_equal_the_reference,
           [(CONTROLLERS, "sequence", faults.with_loss(faults.sequence_loss_over_batch))]),
    Mutant("8 rows of padding dilute it", checks_balance.check_losses_equal_the_reference,
           [(CONTROLLERS, "sequence", faults.with_loss(faults.sequence_loss_counting_empty_rows))]),
    Mutant("8 coefficient lost", checks_balance.check_known_balance,
           [(CONTROLLERS, "sign", faults.with_loss(balance.sequence_loss, alpha=1.0))]),
    Mutant("9 router multiplies in bfloat16", checks_router.check_router_computes_in_float32,
           [(router, "route", faults.rebuilt_route(cast=jnp.bfloat16))]),
    Mutant("9 router quantised with the rest", checks_router.check_router_computes_in_float32,
           [(router, "route", faults.rebuilt_route(cast=jnp.float8_e4m3fn))]),
    Mutant("9 router in the FP8 recipe", checks_router.check_router_computes_in_float32,
           [(router, "products", faults.products_of_everything)]),
    Mutant("10 scaling factor missing", checks_router.check_known_choices, [(router, "gates", faults.gates_without_scale)]),
    Mutant("10 scaling factor applied twice", checks_router.check_known_choices,
           [(router, "gates", faults.gates_scaled_twice)]),
    Mutant("10 applied again in the layer", plain_step,
           [(layer, "route", lambda *a: (r := faults.sound[layer, "route"](*a))._replace(gates=2.5 * r.gates))]),
    Mutant("11 targets one too near", checks_mtp.check_known_alignment, [(mtp, "shifted", faults.shifted_one_less)]),
    Mutant("11 targets one too far", checks_mtp.check_known_alignment, [(mtp, "shifted", faults.shifted_one_more)]),
    Mutant("11 document boundaries ignored", checks_mtp.check_targets_within_documents,
           [(mtp, "predicts_within_document", faults.targets_across_documents)]),
    Mutant("11 document boundaries ignored by the loss", STEP,
           [(objective, "predicts_within_document", faults.targets_across_documents)]),
    Mutant("11 embedding not shifted", STEP, [(mtp, "module", faults.module_without_shift)]),
    Mutant("11 head uninitialised", STEP, [(objective, "depth_losses", faults.uninitialised_head)]),
    Mutant("11 weights skipped", STEP, [(mtp, "module", faults.skipped_weights)]),
    Mutant("11 halves of eh_proj swapped", STEP, [(mtp, "module", faults.module_with_swapped_halves)]),
    Mutant("12 mscale missing", checks_attention.check_known_softmax_scales,
           [(mla, "softmax_scale", faults.scale_without_mscale)]),
    Mutant("12 mscale not squared", checks_attention.check_known_softmax_scales,
           [(mla, "softmax_scale", faults.scale_with_mscale_once)]),
    Mutant("12 mscale missing from attention", mla_with_yarn, [(mla, "softmax_scale", faults.scale_without_mscale)]),
    Mutant("12 halves rotated without permutation", checks_attention.check_rotation_equals_the_reference,
           [(mla, "apply_rope", faults.half_rotated)]),
    Mutant("12 halves rotated in attention", mla_with_yarn, [(mla, "apply_rope", faults.half_rotated)]),
    Mutant("12 queries rotated backwards", mla_with_yarn, [(mla, "apply_rope", faults.rotated_backwards)]),
    Mutant("12 only queries permuted", mla_with_yarn, [(mla, "apply_rope", faults.unpermuted_output)]),
    Mutant("12 YaRN frequencies ignored", checks_attention.check_known_frequencies,
           [(rope, "rope_frequencies", faults.frequencies_without_yarn)]),
    Mutant("12 every frequency interpolated", checks_attention.check_known_frequencies,
           [(rope, "rope_frequencies", faults.frequencies_all_interpolated)]),
    Mutant("11 MTP read under a fixed number only", checks_loader.check_mtp_is_found_by_the_depth,
           [(read, "_fill", faults.fill_layer_61_alone)]),
    Mutant("11 every depth reads the first module", checks_loader.check_mtp_is_found_by_the_depth,
           [(read, "_fill", faults.fill_with_first_mtp_layer)]),
    Mutant("12 rotary rows read in halves", checks_loader.check_heads_are_told_apart,
           [(read, "fill_matrix", faults.fill_in_halves)]),
    Mutant("13 scales ignored", checks_loader.check_fp8_is_multiplied_out, [(read, "fill_matrix", faults.fill_without_scale)]),
    Mutant("13 edge blocks take their neighbour's scale", checks_loader.check_fp8_is_multiplied_out,
           [(read, "fill_matrix", faults.fill_with_neighbours_scale)]),
    Mutant("13 blocks counted from the far edge", checks_loader.check_fp8_is_multiplied_out,
           [(read, "fill_matrix", faults.fill_with_shared_scale)]),
    Mutant("14 MTP divided by its micro-batch", STEP, [(step, "objective", faults.scaled_share("mtp"))]),
    Mutant("14 balance divided by its micro-batch", STEP, [(step, "objective", faults.scaled_share("balance"))]),
    Mutant("14 main loss divided by its micro-batch", plain_step, [(step, "objective", faults.scaled_share("main"))]),
    Mutant("14 MTP gradient scaled", STEP, [(step, "objective", faults.mtp_gradient_doubled)]),
    Mutant("14 balance gradient scaled", plain_step, [(step, "objective", faults.balance_gradient_doubled)]),
]  # fmt: skip


SLOW = {STEP, MESH, MESH_MICRO}


def listed(items: list[Any], check_of: Callable[[Any], Any], name_of: Callable[[Any], str]) -> list[Any]:
    """Parameters; those that compile the whole model's gradient step are slow."""
    return [pytest.param(i, id=name_of(i), marks=[pytest.mark.slow] if check_of(i) in SLOW else []) for i in items]


CHECKS = list({m.check: None for m in MUTANTS})


@pytest.mark.parametrize("check", listed(CHECKS, lambda check: check, lambda check: check.__name__))
def test_check_passes_on_the_sound_code(check):
    check()


@pytest.mark.parametrize("mutant", listed(MUTANTS, lambda m: m.check, lambda m: m.bug))
def test_mutant_is_killed(mutant, monkeypatch):
    for owner, name, faulty in mutant.patches:
        if isinstance(owner, dict):
            monkeypatch.setitem(owner, name, faulty)
        else:
            assert callable(getattr(owner, name))
            monkeypatch.setattr(owner, name, faulty)
    with pytest.raises(AssertionError):  # a value that is wrong; a crash would be no proof
        mutant.check()
