"""The NumPy reference reproduces the stored cases and the known vectors.

Tolerances against stored float32 outputs: two correct float32 implementations differ by 1.5e-5 in logits of standard deviation
1.5, and by up to 5e-5 in the residual stream, whose entries are larger. float64 is only compared where both sides are float64.
"""

import functools

import numpy as np
import pytest

from oracles import vectors
from oracles.cases import CASES, load_case
from oracles.numpy_model import (
    aligned_targets,
    cross_entropy,
    expert_counts,
    forward,
    max_violation,
    mtp_forward,
    numerical_gradient,
    rope_frequencies,
    rope_multiplier,
    route,
    route_token,
    router_settings,
    sequence_wise_loss,
    sign_bias_update,
    softmax_scale,
)
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors

FLOAT32_LOGITS, FLOAT32_HIDDEN = 4e-5, 1e-4


@functools.cache
def run_case(name):
    config, tensors, expected = load_case(name)
    return forward(tensors, config, expected["input_ids"])


def next_token_loss(logits, tokens, depth=0):
    targets, valid = aligned_targets(tokens, logits.shape[1], depth)
    return cross_entropy(logits, targets, valid)


def ascending(routing):
    """Indices and gates in the order of the stored cases: ascending by expert id."""
    order = np.argsort(routing["indices"], axis=-1)
    return np.take_along_axis(routing["indices"], order, -1), np.take_along_axis(routing["gates"], order, -1)


@pytest.mark.parametrize("name", CASES)
def test_stored_hidden_states_and_logits_are_reproduced(name):
    expected, actual = load_case(name).expected, run_case(name)
    hidden = [key for key in expected if key.startswith(("hidden_", "attn_out_", "mlp_out_"))]
    assert len(hidden) >= 5  # embedding, three layers, final norm
    for key in hidden:
        np.testing.assert_allclose(actual[key], expected[key], rtol=0, atol=FLOAT32_HIDDEN, err_msg=key)
    np.testing.assert_allclose(actual["logits"], expected["logits"], rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("name", CASES)
def test_stored_router_choices_are_reproduced_exactly_and_gates_closely(name):
    expected, routing = load_case(name).expected, run_case(name)["routing"]
    assert set(routing) == {1, 2}
    for layer, record in routing.items():
        indices, gates = ascending(record)
        np.testing.assert_allclose(record["logits"], expected[f"router_logits_{layer}"], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(indices, expected[f"topk_idx_{layer}"])
        np.testing.assert_allclose(gates, expected[f"topk_w_{layer}"], rtol=0, atol=5e-6)
        # The README promises that no choice is closer than this; only then may indices be compared exactly.
        assert min(record["margin"].min(), record["group_margin"].min()) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_stored_loss_is_reproduced(name):
    expected = load_case(name).expected
    # One float32 rounding of a loss near 7 is 5e-7.
    assert next_token_loss(run_case(name)["logits"], expected["input_ids"]) == pytest.approx(float(expected["loss"]), abs=2e-6)


def test_stored_float64_logits_and_loss_are_reproduced_to_rounding():
    expected, logits = load_case("wide").expected, run_case("wide")["logits"]
    np.testing.assert_allclose(logits, expected["logits64"], rtol=0, atol=1e-11)
    assert next_token_loss(logits, expected["input_ids"]) == pytest.approx(float(expected["loss64"]), abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_stored_greedy_continuation_is_what_the_logits_say(name):
    config, tensors, expected = load_case(name)
    prompt, decoded = expected["input_ids"], expected["decode_ids"]
    logits = forward(tensors, config, np.concatenate([prompt, decoded[:, :-1]], axis=1))["logits"][:, prompt.shape[1] - 1 :]
    np.testing.assert_allclose(logits, expected["decode_logits"], rtol=0, atol=FLOAT32_LOGITS)
    np.testing.assert_array_equal(logits.argmax(axis=-1), decoded)


@pytest.mark.parametrize(
    "name, tensor_names",
    [
        ("base", ["self_attn.q_b_proj", "self_attn.kv_b_proj", "mlp.gate", "mlp.shared_experts.up_proj", "input_layernorm"]),
        ("noqlora", ["self_attn.q_proj", "self_attn.kv_a_layernorm", "self_attn.o_proj", "mlp.experts.3.down_proj"]),
    ],
)
def test_stored_gradients_are_the_slopes_of_our_loss(name, tensor_names):
    config, tensors, expected = load_case(name)
    stored = dict(zip(expected["grad_names"], expected["grad_dot_w"], strict=True))
    tokens = expected["input_ids"]
    for name in [f"model.layers.1.{part}.weight" for part in tensor_names] + ["model.embed_tokens.weight", "lm_head.weight"]:

        def loss(scale, name=name):
            scaled = tensors | {name: np.asarray(tensors[name], np.float64) * scale[0]}
            return next_token_loss(forward(scaled, config, tokens)["logits"], tokens)

        slope = numerical_gradient(loss, np.ones(1), step=1e-5)[0]
        # Stored as the float32 sum of gradient * weight, whose terms cancel; central differences are good to 1e-9 here.
        assert slope == pytest.approx(float(stored[name]), rel=1e-4, abs=2e-6), name


def test_stored_mtp_outputs_are_reproduced():
    config, tensors, expected = load_case("mtp")
    (module,) = mtp_forward(tensors, config, run_case("mtp"), expected["input_ids"])
    for key, tolerance in {"input": FLOAT32_HIDDEN, "hidden": FLOAT32_HIDDEN, "logits": FLOAT32_LOGITS}.items():
        np.testing.assert_allclose(module[key], expected[f"mtp_{key}"], rtol=0, atol=tolerance)
    indices, gates = ascending(module["routing"])
    np.testing.assert_array_equal(indices, expected["mtp_topk_idx"])
    np.testing.assert_allclose(gates, expected["mtp_topk_w"], rtol=0, atol=5e-6)
    assert next_token_loss(module["logits"], expected["input_ids"], depth=1) == pytest.approx(
        float(expected["mtp_loss"]), abs=2e-6
    )


def test_stored_mtp_module_shares_embedding_and_head_with_the_main_model():
    tensors = load_case("mtp").tensors
    for copy, original in {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}.items():
        if f"model.layers.3.{copy}.weight" in tensors:
            np.testing.assert_array_equal(tensors[f"model.layers.3.{copy}.weight"], tensors[f"{original}.weight"])


@pytest.mark.parametrize("after_norm, embedding_first", [(False, True), (True, False)])
def test_the_other_mtp_convention_does_not_reproduce_the_stored_case(after_norm, embedding_first):
    config, tensors, expected = load_case("mtp")
    (module,) = mtp_forward(
        tensors, config, run_case("mtp"), expected["input_ids"], hidden_after_norm=after_norm, embedding_first=embedding_first
    )
    assert np.abs(module["logits"] - expected["mtp_logits"]).max() > 0.1


def test_filling_dropped_groups_with_zero_would_change_the_wide_case():
    config, tensors, expected = load_case("wide")
    bias = np.asarray(tensors["model.layers.1.mlp.gate.e_score_correction_bias"], np.float64)
    wrong = route(run_case("wide")["routing"][1]["logits"], bias, **router_settings(config), dropped_fill=0.0)
    assert (ascending(wrong)[0] != expected["topk_idx_1"]).any()


def test_yarn_frequencies_are_the_known_ones():
    frequencies = rope_frequencies(vectors.V3_ROPE)
    plain = rope_frequencies(vectors.V3_ROPE_PRETRAINING)
    for pair, value in vectors.V3_YARN_FREQUENCIES.items():
        assert frequencies[pair] == pytest.approx(value, rel=1e-9)
    last, first = vectors.V3_LAST_PLAIN_PAIR, vectors.V3_FIRST_INTERPOLATED_PAIR
    np.testing.assert_array_equal(frequencies[: last + 1], plain[: last + 1])
    np.testing.assert_allclose(frequencies[first:], plain[first:] / 40, rtol=1e-15)
    np.testing.assert_allclose(plain, [10000 ** (-j / 32) for j in range(32)], rtol=1e-14)


def test_softmax_scales_are_the_known_ones():
    assert softmax_scale(vectors.V3_ROPE_PRETRAINING) == pytest.approx(vectors.SOFTMAX_SCALE_V3_PRETRAINING, abs=5e-11)
    assert softmax_scale(vectors.V3_ROPE) == pytest.approx(vectors.SOFTMAX_SCALE_V3_YARN, abs=5e-11)
    assert softmax_scale(vectors.V2_ROPE) == pytest.approx(vectors.SOFTMAX_SCALE_V2_YARN, abs=5e-8)
    assert rope_multiplier(vectors.V3_ROPE) == rope_multiplier(vectors.V2_ROPE) == 1.0


@pytest.mark.parametrize(
    "bias, known", [(vectors.ROUTER_BIAS, vectors.ROUTER_WITH_BIAS), (np.zeros(16), vectors.ROUTER_WITHOUT_BIAS)]
)
def test_router_makes_the_known_choice(bias, known):
    routing = route_token(vectors.ROUTER_LOGITS, bias, **vectors.ROUTER_SETTINGS)
    np.testing.assert_allclose(routing["group_scores"], known["group_scores"], atol=5e-7)
    assert sorted(routing["kept_groups"]) == known["kept_groups"]
    assert list(routing["indices"]) == known["indices"]
    np.testing.assert_allclose(routing["gates"], known["gates"], atol=5e-7)
    assert routing["gates"].sum() == pytest.approx(2.5, abs=1e-12)


@pytest.mark.parametrize("fill, known", [(-np.inf, vectors.FILL_MINUS_INF), (0.0, vectors.FILL_ZERO)])
def test_fill_of_dropped_groups_gives_the_known_choice(fill, known):
    routing = route_token(vectors.FILL_LOGITS, vectors.FILL_BIAS, **vectors.FILL_SETTINGS, dropped_fill=fill)
    assert list(routing["kept_groups"]) == [vectors.FILL_KEPT_GROUP]
    assert list(routing["indices"]) == known["indices"]
    np.testing.assert_allclose(routing["gates"], known["gates"], atol=5e-7)


def test_balance_loss_bias_step_and_max_violation_are_the_known_ones():
    routing = route(vectors.BALANCE_LOGITS, np.zeros(4), **vectors.BALANCE_SETTINGS)
    valid = np.ones(4, bool)
    counts = expert_counts(routing["indices"], 4, valid)
    assert list(counts) == vectors.BALANCE_COUNTS
    np.testing.assert_allclose(4 / (2 * 4) * counts, vectors.BALANCE_F)
    normalised = routing["scores"] / routing["scores"].sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(normalised.mean(axis=0), vectors.BALANCE_P, atol=5e-7)
    loss = sequence_wise_loss(routing["scores"][None], routing["indices"][None], valid[None])
    assert loss == pytest.approx(vectors.BALANCE_LOSS, abs=5e-8)
    assert vectors.BALANCE_ALPHA * loss == pytest.approx(vectors.BALANCE_LOSS_TIMES_ALPHA, abs=5e-12)
    np.testing.assert_array_equal(sign_bias_update(np.zeros(4), counts, vectors.BIAS_RATE), vectors.BIAS_AFTER_ONE_STEP)
    assert max_violation(counts) == vectors.MAX_VIOLATION


@pytest.mark.parametrize("depth", vectors.MTP_ALIGNMENT)
def test_mtp_positions_predict_the_known_targets(depth):
    targets, valid = aligned_targets(vectors.MTP_TOKENS, vectors.MTP_LENGTH, depth)
    counted = [(int(i), int(targets[0, i])) for i in np.flatnonzero(valid[0])]
    assert counted == [(position, target) for position, _, target in vectors.MTP_ALIGNMENT[depth]]


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_position_reads_the_known_embedding(depth):
    config = SMALL_CONFIG | {"num_nextn_predict_layers": depth}
    tensors = random_tensors(config, seed=5)
    main = forward(tensors, config, vectors.MTP_TOKENS[:, : vectors.MTP_LENGTH])
    read = {i: embedded for i, embedded, _ in vectors.MTP_ALIGNMENT[depth]}
    before = mtp_forward(tensors, config, main, vectors.MTP_TOKENS)[-1]["input"]
    changed = random_tensors(config, seed=5)
    for position, token in read.items():
        # `main` is kept: what changes below comes from the embedding that the module itself reads.
        changed["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
        changed["model.embed_tokens.weight"][token] *= -1.0
        module_input = mtp_forward(changed, config, main, vectors.MTP_TOKENS)[-1]["input"]
        assert np.abs(module_input - before)[0, position].max() > 0.1
        if depth == 1:  # deeper inputs also see it through the module before
            assert set(np.flatnonzero(np.abs(module_input - before)[0].max(axis=-1))) == {position}
