"""Gaps in loss, layers' errors and routing flips, each against brute force."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.analysis import precision, precision_figure
from dsv3_jax.analysis.figures import save
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.module import init_variables
from dsv3_jax.model.transformer import block, forward, make_context
from dsv3_jax.moe.router import Routing
from dsv3_jax.settings import override
from oracles.micro import micro_config


def run(losses, validation=2.0):
    raw = {"loss": {"all": validation}}
    records = [{"step": i + 1, "main_loss": loss} for i, loss in enumerate(losses)]
    return {"metrics": records, "validation": {"raw": raw} if validation else None}


def brute_smooth(values):
    weights = [0.9 ** (len(values) - 1 - i) for i in range(len(values))]
    return float(np.dot(weights, values) / np.sum(weights))


LOSSES = np.random.default_rng(0).uniform(2, 6, (2, 3, 24))  # arm, seed, step


def test_losses_are_smoothed_with_coefficient_09_from_the_first_step_on():
    found = precision.smoothed(run(LOSSES[0, 0])["metrics"])
    np.testing.assert_allclose(found, [brute_smooth(LOSSES[0, 0, : t + 1]) for t in range(24)], rtol=1e-12)


def test_a_skipped_step_changes_no_smoothed_loss():
    found = precision.smoothed(run([None, 3.0, None, 5.0])["metrics"])
    np.testing.assert_allclose(found[1:], [3.0, 3.0, brute_smooth([3.0, 5.0])], rtol=1e-12)
    assert np.isnan(found[0])


def brute_gaps():
    smooth = np.array([[[brute_smooth(of_seed[: t + 1]) for t in range(24)] for of_seed in arm] for arm in LOSSES])
    return 100 * (smooth[0] / smooth[1] - 1)


def test_a_gap_is_relative_paired_by_seed_and_has_students_interval():
    found = precision.loss_gap(*([run(losses) for losses in arm] for arm in LOSSES))
    expected = brute_gaps()
    pairs = expected[:, 18:].mean(axis=1)  # the last quarter of 24 steps
    np.testing.assert_allclose(found["pairs"], pairs, rtol=1e-9)
    assert found["mean"] == pytest.approx(pairs.mean())
    assert found["half_width_95"] == pytest.approx(4.302653 * pairs.std(ddof=1) / 3**0.5)  # t table, 2 degrees of freedom
    np.testing.assert_allclose(found["curve"]["mean"], expected.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found["curve"]["half_width_95"], 4.302653 * expected.std(axis=0, ddof=1) / 3**0.5, rtol=1e-6)
    assert found["largest"] == pytest.approx(np.abs(expected.mean(axis=0))[2:].max())


def test_the_validations_gap_is_relative_too_and_absent_where_a_run_has_none():
    arms = [[run([3.0] * 4, v) for v in values] for values in ((2.02, 4.0), (2.0, 4.0))]
    assert precision.loss_gap(*arms)["validation"]["pairs"] == pytest.approx([1.0, 0.0])
    arms[0][1]["validation"] = None
    assert precision.loss_gap(*arms)["validation"] is None


def test_a_shorter_run_is_compared_over_its_own_steps():
    short, whole = [run([2.02] * 8, None)], [run([2.0] * 8 + [1.0] * 8)]
    found = precision.loss_gap(short, whole)
    assert found["mean"] == pytest.approx(1.0) and found["curve"]["step"] == list(range(1, 9))


@pytest.mark.parametrize(
    ("mean", "half_width", "expected"),
    [
        (0.1, 0.1, "within"),
        (-0.1, 0.1, "within"),
        (0.2, 0.1, "not resolved"),
        (-0.3, 0.1, "not resolved"),
        (0.0, 9.0, "not resolved"),
        (0.4, 0.1, "outside"),
        (-0.4, 0.1, "outside"),
        (0.0, None, "not resolved"),
    ],
)
def test_the_verdict_follows_the_whole_interval(mean, half_width, expected):
    assert precision.verdict(mean, half_width) == expected


def test_an_arm_whose_last_losses_are_not_finite_has_diverged_and_stays_json():
    found = precision.loss_gap([run([3.0] * 6 + [None] * 2)], [run([3.0] * 8)])
    assert found["verdict"] == "diverged" and json.dumps(found, allow_nan=False)
    found = precision.loss_gap([run([None] * 8)], [run([3.0] * 8)])
    assert found["verdict"] == "diverged" and found["mean"] is None and json.dumps(found, allow_nan=False)


def test_a_relative_error_takes_several_arrays_as_one():
    ours, reference = [np.array([1.0, 2.0]), np.array([[5.0]])], [np.array([1.0, 0.0]), np.array([[3.0]])]
    assert precision.relative_error(ours, reference) == pytest.approx((8 / 10) ** 0.5)
    assert precision.relative_error(ours, ours) == 0.0


# --- flips ---


def routing(indices, margin):
    indices, margin = jnp.array(indices, jnp.int32), jnp.array(margin, jnp.float32)
    unread = jnp.zeros((*margin.shape, 4), jnp.float32)
    return Routing(indices, unread[..., :2], unread, unread, margin)


REFERENCE = routing([[[[0, 1], [2, 3], [0, 3]]], [[[1, 2], [0, 1], [2, 3]]]], [[[2e-4, 0.2, 9.0]], [[2e-4, 1e-9, np.inf]]])
OURS = routing([[[[1, 0], [2, 0], [1, 2]]], [[[1, 3], [1, 0], [0, 1]]]], np.zeros((2, 1, 3)))


def test_a_flip_is_another_set_of_experts_and_not_another_order():
    found = precision.flips(OURS, REFERENCE, np.array([[True, True, True]]))
    assert found.exchanged_LN.tolist() == [[0, 1, 2], [1, 0, 2]]


def test_padding_flips_nothing():
    found = precision.flips(OURS, REFERENCE, np.array([[True, True, False]]))
    assert (
        found.exchanged_LN.tolist() == [[0, 1], [1, 0]]
        and found.margin_LN.tolist() == np.float32([[2e-4, 0.2], [2e-4, 1e-9]]).tolist()
    )


def test_flips_are_counted_by_layer_and_by_the_references_margin():
    valid = np.array([[True, True, True]])
    once = precision.flips(OURS, REFERENCE, valid)
    found = precision.summarise_flips([once, precision.flips(REFERENCE, REFERENCE, valid)])  # the second seed flips nothing
    assert found["rate"] == pytest.approx(4 / 12) and found["experts_exchanged"] == pytest.approx(6 / 12)
    assert found["rate_by_layer"] == pytest.approx([2 / 6, 2 / 6])
    edges, tokens, rate = (found["margin"][name] for name in ("edges", "tokens", "rate"))
    assert len(tokens) == len(rate) == len(edges) + 1 and sum(tokens) == 12
    at = np.searchsorted(edges, [1e-9, 2e-4, 0.2, 9.0], side="right")
    assert [tokens[i] for i in at] == [2, 4, 2, 4]
    assert [rate[i] for i in at] == pytest.approx([0.0, 1 / 4, 1 / 2, 2 / 4])
    assert rate[at[1] + 1] is None


# --- layers ---


@pytest.fixture(scope="module")
def small(tmp_path_factory, quick_compilation):
    """(config, params, bias, batch): a dense layer and two of experts; two documents in a row, and padding."""
    config = micro_config(tmp_path_factory.mktemp("micro"), num_hidden_layers=3, num_nextn_predict_layers=0)
    variables = init_variables(config.model, 3)
    rng = np.random.default_rng(1)
    segments = np.array([[1] * 7 + [2] * 10, [1] * 12 + [0] * 5], np.int32)
    tokens = np.where(segments, rng.integers(0, config.model.vocab_size, segments.shape), 0).astype(np.int32)
    bias = jnp.asarray(rng.normal(0, 0.02, variables.bias_LE.shape), jnp.float32)
    return config, variables.params, bias, {"tokens": tokens, "segment_ids": segments}


def valid_of(batch):
    return batch["segment_ids"][:, :-1] != 0


def mean_nll(params, normed_BTD, batch):
    """Of the targets in the same document, written down as it is defined."""
    segments, tokens = (jnp.asarray(batch[name]) for name in ("segment_ids", "tokens"))
    log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", normed_BTD, params["lm_head"]))
    nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[:, :, 0]
    counted = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != 0)
    return jnp.where(counted, nll, 0.0).sum() / counted.sum().astype(jnp.float32)


def test_the_pass_is_the_models_own_with_the_same_loss_choices_and_parameter_gradients(small):
    config, params, bias, batch = small

    def loss(params):
        context = make_context(jnp.asarray(batch["segment_ids"][:, :-1]), config.model, cross_document=True)
        hidden = forward(params, bias, jnp.asarray(batch["tokens"][:, :-1]), context, config.model)
        return mean_nll(params, hidden.normed_BTD, batch), hidden

    (value, hidden), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    found = precision.observe(params, bias, batch, config=config)
    assert float(found.loss) == pytest.approx(float(value), rel=1e-6)
    # float32 sums in another order
    np.testing.assert_allclose(found.activations[-1], hidden.residual_BTD, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.routing.indices, hidden.layers.indices)
    for stack, of_stack in found.parameters.items():
        for ours, theirs in zip(jax.tree.leaves(of_stack), jax.tree.leaves(grads[stack]), strict=True):
            assert precision.relative_error([ours], [theirs]) < 1e-5


def test_a_streams_gradient_is_that_of_a_forward_pass_restarted_there(small):
    config, params, bias, batch = small
    context = make_context(jnp.asarray(batch["segment_ids"][:, :-1]), config.model, cross_document=True)

    def restarted(x_BTD, first):
        for at in range(first, 2):  # of the MoE layers, which are the model's layers 1 and 2
            x_BTD, _ = block(jax.tree.map(lambda a, at=at: a[at], params["moe_layers"]), bias[at], x_BTD, context, config.model)
        return mean_nll(params, rms_norm(x_BTD, params["norm"], config.model.rms_norm_eps), batch)

    found = precision.observe(params, bias, batch, config=config)
    for layer in range(3):
        expected = jax.jit(jax.grad(restarted), static_argnums=1)(found.activations[layer], layer)
        assert precision.relative_error([found.gradients[layer]], [expected]) < 1e-5  # float32 sums in another order


@pytest.mark.slow
def test_equal_configs_have_no_error_and_rounding_has_more_in_fp8_than_in_bfloat16(small):
    config, params, bias, batch = small
    reference = precision.observe(params, bias, batch, config=config)
    again = override(config, {"seed": 7})
    errors = precision.layer_errors(precision.observe(params, bias, batch, config=again), reference, valid_of(batch))
    assert errors == {name: [0.0] * 3 for name in ("activations", "gradients", "parameters")}
    by_format = []
    for settings in ({"compute_dtype": "bfloat16"}, {"compute_dtype": "bfloat16", "fp8": '{"tile": 8}'}):
        ours = precision.observe(params, bias, batch, config=override(config, settings))
        by_format.append(precision.layer_errors(ours, reference, valid_of(batch)))
    bf16, fp8 = by_format
    for name in errors:
        assert len(fp8[name]) == 3 and all(0 < b < f < 1 for b, f in zip(bf16[name], fp8[name], strict=True)), (name, bf16, fp8)


def test_what_padding_holds_is_no_error(small):
    config, params, bias, batch = small
    found = precision.observe(params, bias, batch, config=config)
    moved = found.activations + jnp.where(jnp.asarray(valid_of(batch)), 0.0, 1.0)[None, :, :, None]
    assert precision.layer_errors(found._replace(activations=moved), found, valid_of(batch))["activations"] == [0.0] * 3


def test_a_layers_parameters_are_its_own_and_the_dense_layers_come_first(small):
    config, params, bias, batch = small
    found = precision.observe(params, bias, batch, config=config)
    scales = {"dense_layers": jnp.array([1.01]), "moe_layers": jnp.array([1.02, 1.03])}
    scaled = {
        name: jax.tree.map(lambda leaf, s=scales[name]: leaf * s.reshape(-1, *(1,) * (leaf.ndim - 1)), stack)
        for name, stack in found.parameters.items()
    }
    errors = precision.layer_errors(found._replace(parameters=scaled), found, valid_of(batch))
    assert errors["parameters"] == pytest.approx([0.01, 0.02, 0.03], rel=1e-4)  # of float32 products


# --- table and figures ---


def result(seeds=3, diverging=False):
    runs = {arm: [run(LOSSES[i % 2, seed]) for seed in range(seeds)] for i, arm in enumerate(("fp32", "ulp", "bf16", "fp8"))}
    if diverging:
        runs["fp8"] = [run([3.0] + [None] * 23, None)] * seeds
    layers = {"activations": [0.01, 0.02], "gradients": [0.03, 0.04], "parameters": [0.05, 0.06]}
    flipped = precision.summarise_flips([precision.flips(OURS, REFERENCE, np.array([[True, True, True]]))])
    arms = {
        arm: {
            "fp8": {"tile": 8} if arm == "fp8" else None,
            "loss": None if diverging and arm == "fp8" else 3.0,
            "gaps": {base: precision.loss_gap(of_arm, runs[base]) for base in ("bf16", "fp32") if base != arm},
            "layers": layers if arm in ("bf16", "fp8") else None,
            "flips": flipped if arm in ("bf16", "fp8") else None,
        }
        for arm, of_arm in runs.items()
    }
    return {"seeds": seeds, "steps": 24, "limits": {"fp8": 5}, "moe_layers": [1, 2], "arms": arms}


@pytest.mark.parametrize("case", [{}, {"seeds": 1}, {"diverging": True}])
def test_table_and_figures_show_every_arm(case, tmp_path):
    shown = result(**case)
    text = precision_figure.table(shown)
    assert all(arm in text for arm in shown["arms"]) and max(map(len, text.splitlines())) <= 100
    assert "chaos alone" in text and "fp8: gaps of the first 5 steps" in text
    assert ("diverged" in text) == case.get("diverging", False)
    assert ("+-" in text) == (case.get("seeds") != 1)
    for name in ("draw_gaps", "draw_layers", "draw_flips"):
        save(getattr(precision_figure, name)(shown), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
