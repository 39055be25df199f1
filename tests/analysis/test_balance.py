"""Balance over training: windows, spans, turns and the bias controller on fixed scores, against loops."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.analysis import balance
from dsv3_jax.model.module import init_variables
from dsv3_jax.model.transformer import forward, make_context
from oracles.traces import CONFIG

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_windows_are_those_of_a_loop():
    load = np.random.default_rng(0).integers(0, 5, (9, 2, 4)).astype(np.int32)
    load[2:6, 1] = 0
    for window in (1, 3, 9, 20):
        found = balance.windowed_violation(load, window)
        for t in range(9):
            for layer in range(2):
                total = load[max(0, t - window + 1) : t + 1, layer].sum(axis=0)
                if t < window - 1 or not total.any():
                    assert np.isnan(found[t, layer])
                else:
                    assert found[t, layer] == pytest.approx(total.max() / total.mean() - 1)


@pytest.mark.parametrize("most", [1, 3, 7, 50])
def test_spans_hold_every_step_once_and_their_load_is_relative(most):
    load = np.random.default_rng(1).integers(1, 9, (7, 4)).astype(np.int32)
    first, relative = balance.load_map(load, most)
    assert first[0] == 0 and first[-1] == 7 and len(first) == min(most, 7) + 1 and (np.diff(first) > 0).all()
    assert np.ptp(np.diff(first)) <= 1
    for i, (a, b) in enumerate(zip(first[:-1], first[1:], strict=True)):
        total = load[a:b].sum(axis=0)
        np.testing.assert_allclose(relative[:, i], total / total.mean())


def test_a_turn_is_an_update_against_the_last_one_that_was_not_zero():
    path = np.cumsum([[0, 0, 0], [1, 1, 1], [1, -1, 0], [1, 1, -1], [0, 0, 1]], axis=0).astype(np.float32)
    found = balance.turned(0.1 * path[:, None])
    np.testing.assert_allclose(found[:, 0], [0, 0, 1 / 3, 2 / 3, 1 / 3])


def test_the_spread_of_scores_is_within_tokens_and_between_experts():
    scores = np.array([[[0.0, 1.0], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.7]], [[0.5, 0.5], [0.5, 0.9]]], np.float16)
    found = balance.score_spread(scores)
    np.testing.assert_allclose(found.token_L, [1 / 3, 0.1], atol=1e-3)  # half of 1, 1 and 0; of 0, 0.2 and 0.4; FP16
    np.testing.assert_allclose(found.expert_L, [0.0, 0.1], atol=1e-3)  # half of 0, and of 0.7 - 0.5


def test_a_bias_balances_fixed_scores_and_only_a_small_speed_does_so_finely():
    rng = np.random.default_rng(2)
    scores = (0.5 + 0.05 * rng.normal(size=(2000, 16)) + np.linspace(-0.05, 0.05, 16)).astype(np.float32)
    fast, slow = (balance.balance_scores(scores, CONFIG, u, steps=400, batch_tokens=500) for u in (2e-2, 5e-4))
    assert fast.step_S.tolist() == slow.step_S.tolist() == list(range(10, 401, 10))
    assert slow.violation_S[0] > 1 > fast.violation_S[:5].min()
    assert slow.violation_S[-10:].mean() < 0.2 < fast.violation_S[-10:].mean()
    assert np.corrcoef(slow.bias_SE[-1], scores.mean(axis=0))[0, 1] < -0.9  # what is in demand is pushed down
    steps = slow.bias_SE / 5e-4
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-2)  # each update is the speed, up or down
    assert abs(steps[0]).max() <= 10


def test_the_violation_on_fixed_scores_is_that_of_the_group_limited_choice_of_all_tokens():
    rng = np.random.default_rng(3)
    scores = rng.random((300, 16)).astype(np.float32)
    found = balance.balance_scores(scores, CONFIG, 1e-2, steps=10, batch_tokens=100)
    load = np.zeros(16, int)
    for row in scores + found.bias_SE[-1]:
        groups = row.reshape(4, 4)
        kept = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1), kind="stable")[:2]
        row = np.where(np.isin(np.arange(16) // 4, kept), row, -np.inf)
        load[np.argsort(-row, kind="stable")[:2]] += 1
    assert found.violation_S[-1] == pytest.approx(load.max() / load.mean() - 1, rel=1e-6)


SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "rope_scaling": None, "compute_dtype": "float32", "remat": "none",
}  # fmt: skip


def test_a_checkpoint_s_choices_are_its_model_s_without_the_tokens_that_mtp_has_none_for():
    config = replace(CONFIG, **SMALL)
    variables = init_variables(config)
    bias = jnp.asarray(np.random.default_rng(4).normal(0, 0.1, variables.bias_LE.shape), jnp.float32)
    variables = variables._replace(bias_LE=bias)
    tokens = np.random.default_rng(5).integers(0, 64, (3, 9)).astype(np.int32)
    found = balance.choices_of(variables, config, tokens)
    assert found.experts_NLK.shape == (3 * 8, 3, 2) and found.scores_NLE.shape == (3 * 8, 3, 16)
    context = make_context(jnp.ones((3, 9), jnp.int32), config, cross_document=True)
    main = forward(variables.params, bias, jnp.asarray(tokens), context, config)
    for row in range(3):
        for t in range(8):
            for layer in range(2):
                expected = np.asarray(main.layers.indices)[layer, row, t]
                assert (found.experts_NLK[row * 8 + t, layer] == expected).all()
                scores = np.asarray(main.layers.scores)[layer, row, t]
                np.testing.assert_allclose(found.scores_NLE[row * 8 + t, layer], scores, atol=1e-3)  # kept as FP16


def test_the_mean_of_a_run_s_last_part_leaves_out_what_is_not_finite():
    values = np.array([9.0, 9, 9, 9, 9, 9, 1, np.nan, 3, np.inf, np.nan, np.nan])
    assert balance.late_share(values, 0.5) == 2 and np.isnan(balance.late_share(values))
    assert balance.late_share(np.array([4.0])) == 4
