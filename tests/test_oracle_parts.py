"""Invariants that define the parts of the NumPy reference, for what no stored case covers: packing, GQA, deeper MTP, ..."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles import vectors
from oracles.cases import CASES, load_case
from oracles.numpy_model import (
    aligned_targets,
    attention_mask,
    batch_wise_loss,
    classical_loss,
    cross_entropy,
    expert_counts,
    forward,
    max_violation,
    mtp_forward,
    numerical_gradient,
    rotate,
    route,
    route_token,
    router_settings,
    sequence_wise_loss,
    sigmoid,
    sign_bias_update,
    softmax,
)
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors, tensor_shapes
from oracles.safetensors_reader import read_safetensors


def test_reader_gives_stored_dtypes_and_values(tmp_path):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1.5, -2], ml_dtypes.float8_e4m3fn)}
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"b":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[24,26]}}'
    )
    path = tmp_path / "two.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values["a"].tobytes() + values["b"].tobytes())
    tensors = read_safetensors(path)
    assert list(tensors) == ["a", "b"]
    for name, value in values.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)


def test_random_tensors_have_the_names_and_shapes_of_a_stored_checkpoint():
    for name in CASES:
        config, tensors, _ = load_case(name)
        copies = {f"model.layers.3.{part}.weight" for part in ("embed_tokens", "shared_head.head")}
        assert tensor_shapes(config) == {key: value.shape for key, value in tensors.items() if key not in copies}


@given(st.integers(0, 50), st.integers(0, 50), st.integers(-40, 40), st.integers(0, 2**32 - 1))
def test_rotated_scores_depend_on_distance_alone_and_pairs_keep_their_length(query_at, key_at, shift, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 6))
    frequencies = np.array([1.0, 0.1, 0.01])

    def score(i, j):
        return (rotate(q, [i], frequencies) @ rotate(k, [j], frequencies).T).item()

    assert score(query_at, key_at) == pytest.approx(score(query_at + shift, key_at + shift), abs=1e-11)
    pairs = rotate(q, [query_at], frequencies).reshape(3, 2)
    np.testing.assert_allclose(np.hypot(*pairs.T), np.hypot(*q.reshape(3, 2).T), rtol=1e-12)


def test_first_pair_is_rotated_as_a_complex_number():
    turned = rotate(np.array([[1.0, 2.0, 0.0, 0.0]]), [3], np.array([0.5, 0.25]))
    expected = (1 + 2j) * complex(math.cos(1.5), math.sin(1.5))
    np.testing.assert_allclose(turned[0], [expected.real, expected.imag, 0.0, 0.0], rtol=1e-14)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "mla": {},
    "mla_without_query_compression": {"q_lora_rank": None},
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa": {"attention": "mqa"},
    "yarn": {"rope_scaling": vectors.V3_YARN | {"original_max_position_embeddings": 16}},
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_packed_documents_give_what_each_gives_alone_and_the_future_is_invisible(kind):
    config = SMALL_CONFIG | ATTENTIONS[kind]
    tensors = random_tensors(config, seed=1)
    tokens = np.random.default_rng(2).integers(0, config["vocab_size"], (1, 9))
    packed = forward(tensors, config, tokens, np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]]))
    alone = [forward(tensors, config, tokens[:, part])["logits"] for part in (slice(0, 5), slice(5, 8))]
    # Rotary positions differ by the document's offset, scores do not: float64 rounding.
    np.testing.assert_allclose(packed["logits"][:, :8], np.concatenate(alone, axis=1), rtol=0, atol=1e-11)
    unpacked = forward(tensors, config, tokens)["logits"]
    assert np.abs(unpacked[:, 5:8] - packed["logits"][:, 5:8]).max() > 1e-3
    np.testing.assert_allclose(unpacked[:, :4], forward(tensors, config, tokens[:, :4])["logits"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, kv_heads", [("mqa", 1), ("gqa", 2)])
def test_grouped_heads_equal_full_heads_with_repeated_weights(kind, kv_heads):
    grouped = SMALL_CONFIG | {"attention": kind, "num_key_value_heads": kv_heads}
    tensors = random_tensors(grouped, seed=3)
    full = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            by_head = weight.reshape(kv_heads, -1, weight.shape[1])
            full[name] = np.repeat(by_head, 4 // kv_heads, axis=0).reshape(-1, weight.shape[1])
    tokens = np.arange(6)[None]
    expected = forward(full, SMALL_CONFIG | {"attention": "mha"}, tokens)["logits"]
    np.testing.assert_allclose(forward(tensors, grouped, tokens)["logits"], expected, rtol=0, atol=1e-12)


def test_attention_mask_is_causal_within_segments():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(attention_mask(4, np.array([1, 1, 2, 2])), np.array(expected, bool))
    np.testing.assert_array_equal(attention_mask(3), np.tril(np.ones((3, 3), bool)))


def test_mtp_chain_on_packed_documents_equals_each_document_alone():
    config = SMALL_CONFIG | {"num_nextn_predict_layers": 2}
    tensors = random_tensors(config, seed=4)
    tokens = np.random.default_rng(5).integers(0, config["vocab_size"], (1, 12))
    segments = np.array([[1] * 6 + [2] * 5 + [0]])

    def losses_and_counts(tokens, segments):
        main = forward(tensors, config, tokens, segments)
        for depth, module in enumerate(mtp_forward(tensors, config, main, tokens, segments), start=1):
            targets, valid = aligned_targets(tokens, module["logits"].shape[1], depth, segments)
            yield cross_entropy(module["logits"], targets, valid), int(valid.sum())

    packed = list(losses_and_counts(tokens, segments))
    alone = [list(losses_and_counts(tokens[:, part], segments[:, part])) for part in (slice(0, 6), slice(6, 11))]
    for depth in range(2):
        (loss_1, count_1), (loss_2, count_2) = alone[0][depth], alone[1][depth]
        assert (count_1, count_2) == (6 - depth - 2, 5 - depth - 2)
        assert packed[depth][1] == count_1 + count_2
        assert packed[depth][0] == pytest.approx((loss_1 * count_1 + loss_2 * count_2) / (count_1 + count_2), abs=1e-11)


@pytest.mark.parametrize("after_norm", [True, False])
def test_mtp_chain_hands_on_the_state_after_its_own_norm_only_if_told_so(after_norm):
    config = SMALL_CONFIG | {"num_nextn_predict_layers": 2}
    tensors, tokens = random_tensors(config, seed=7), np.arange(8)[None]
    other_gain = {"model.layers.2.shared_head.norm.weight": np.linspace(0.2, 2.0, config["hidden_size"])}
    main = forward(tensors, config, tokens)
    inputs = [
        mtp_forward(weights, config, main, tokens, hidden_after_norm=after_norm)[1]["input"]
        for weights in (tensors, tensors | other_gain)
    ]
    assert bool(np.abs(inputs[0] - inputs[1]).max() > 1e-3) is after_norm


def test_knowing_the_last_label_adds_one_prediction_and_changes_no_other():
    config = SMALL_CONFIG | {"num_nextn_predict_layers": 2}
    tensors = random_tensors(config, seed=6)
    tokens = np.arange(8)[None]
    main = forward(tensors, config, tokens[:, :7])
    with_label, without = (mtp_forward(tensors, config, main, known) for known in (tokens, tokens[:, :7]))
    for depth, (longer, shorter) in enumerate(zip(with_label, without, strict=True), start=1):
        assert longer["logits"].shape[1] == shorter["logits"].shape[1] + 1 == 8 - depth
        np.testing.assert_allclose(longer["logits"][:, :-1], shorter["logits"], rtol=0, atol=1e-12)
        assert aligned_targets(tokens, 7, depth)[1].sum() == aligned_targets(tokens[:, :7], 7, depth)[1].sum() + 1


def test_targets_do_not_cross_documents_or_enter_padding():
    tokens, segments = np.arange(10, 18)[None], np.array([[1, 1, 1, 2, 2, 0, 0, 0]])
    for depth, positions in {0: [0, 1, 3], 1: [0], 2: []}.items():
        targets, valid = aligned_targets(tokens, 8, depth, segments)
        assert list(np.flatnonzero(valid[0])) == positions
        np.testing.assert_array_equal(targets[valid], tokens[0, np.array(positions, int) + depth + 1])


def test_cross_entropy_is_the_hand_calculated_one_and_ignores_invalid_positions():
    logits = np.log([[[0.25, 0.75], [0.5, 0.5], [1e-30, 1.0]]])
    loss = cross_entropy(logits, np.array([[0, 1, 0]]), np.array([[True, True, False]]))
    assert loss == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-14)
    assert cross_entropy(logits, np.zeros((1, 3), int), np.zeros((1, 3), bool)) == 0.0


@given(st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]), st.sampled_from(["sigmoid", "softmax"]), st.integers(0, 2**32 - 1))
def test_margin_is_the_smallest_loss_of_score_that_changes_the_choice(groups, scoring_func, seed):
    n_group, topk_group = groups
    rng = np.random.default_rng(seed)
    logits, bias = rng.standard_normal(8), 0.5 * rng.standard_normal(8)
    settings: dict[str, Any] = {
        "num_experts_per_tok": 2,
        "n_group": n_group,
        "topk_group": topk_group,
        "scoring_func": scoring_func,
    }
    routing = route_token(logits, bias, **settings)
    assert set(routing["indices"] // (8 // n_group)) <= set(routing["kept_groups"])
    if np.isinf(routing["margin"]):
        assert topk_group * 8 // n_group == 2
        return
    # Lower every kept group alike and only the last chosen expert in addition, so that group choice is out of play.
    for share, same in ((0.99, True), (1.01, False)):
        in_kept = np.isin(np.arange(8) // (8 // n_group), routing["kept_groups"])
        nudged = bias + np.where(in_kept, 100.0, 0.0)
        nudged[routing["indices"][-1]] -= share * routing["margin"]
        assert (set(route_token(logits, nudged, **settings)["indices"]) == set(routing["indices"])) is same


def test_bias_steers_the_choice_and_stays_out_of_the_gates():
    logits, bias = np.array([2.0, 1.0, 0.0, -1.0]), np.array([0.0, 0.0, 0.0, 5.0])
    routing = route_token(logits, bias, num_experts_per_tok=2)
    assert list(routing["indices"]) == [3, 0]
    np.testing.assert_allclose(routing["gates"], sigmoid(logits[[3, 0]]) / sigmoid(logits[[3, 0]]).sum(), rtol=1e-14)


def test_group_score_of_one_is_the_maximum_and_softmax_gates_may_stay_unnormalised():
    logits = np.array([3.0, -9.0, 2.0, 1.9])  # best single score in group 0, best pair in group 1
    settings: dict[str, Any] = {"num_experts_per_tok": 1, "n_group": 2, "scoring_func": "softmax", "norm_topk_prob": False}
    by_max = route_token(logits, np.zeros(4), group_score_topk=1, routed_scaling_factor=16.0, **settings)
    assert list(by_max["kept_groups"]) == [0]
    np.testing.assert_allclose(by_max["gates"], 16.0 * softmax(logits)[:1], rtol=1e-14)
    logits[0] = 2.1
    assert list(route_token(logits, np.zeros(4), group_score_topk=1, **settings)["kept_groups"]) == [0]
    assert list(route_token(logits, np.zeros(4), group_score_topk=2, **settings)["kept_groups"]) == [1]


def test_v2_configs_score_a_group_by_its_best_expert_and_v3_configs_by_two():
    assert router_settings(SMALL_CONFIG)["group_score_topk"] == 2
    v2 = SMALL_CONFIG | {"topk_method": "group_limited_greedy"}
    assert router_settings(v2)["group_score_topk"] == 1
    assert router_settings(v2 | {"group_score_topk": 3})["group_score_topk"] == 3


def test_balance_losses_are_the_hand_calculated_ones():
    logits = np.array([[[0.0, math.log(3.0)]]])  # sigmoid 1/2, 3/4; softmax 1/4, 3/4; f = 0, 2
    indices, valid = np.array([[[1]]]), np.ones((1, 1), bool)
    assert sequence_wise_loss(sigmoid(logits), indices, valid) == pytest.approx(1.2, abs=1e-14)
    assert batch_wise_loss(sigmoid(logits), indices, valid) == pytest.approx(1.2, abs=1e-14)
    assert classical_loss(logits, indices, valid) == pytest.approx(1.5, abs=1e-14)


def test_sequence_wise_and_batch_wise_losses_differ_when_sequences_differ():
    # Two sequences, each all on one expert: even over the batch, as uneven as can be within a sequence.
    scores = np.array([[[0.9, 0.1]] * 3, [[0.1, 0.9]] * 3])
    indices, valid = scores.argmax(axis=-1)[..., None], np.ones((2, 3), bool)
    assert sequence_wise_loss(scores, indices, valid) == pytest.approx(1.8, abs=1e-14)
    assert batch_wise_loss(scores, indices, valid) == pytest.approx(1.0, abs=1e-14)


@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_padding_changes_no_balance_loss_and_no_count(seed, padding):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((2, 5 + padding, 4))
    indices = route(logits, np.zeros(4), num_experts_per_tok=2)["indices"]
    valid = np.ones((2, 5 + padding), bool)
    valid[:, 5:] = False
    without = np.ones((2, 5), bool)
    for loss, values in ((sequence_wise_loss, sigmoid(logits)), (batch_wise_loss, sigmoid(logits)), (classical_loss, logits)):
        assert loss(values, indices, valid) == pytest.approx(loss(values[:, :5], indices[:, :5], without), abs=1e-14)
    np.testing.assert_array_equal(expert_counts(indices, 4, valid), expert_counts(indices[:, :5], 4, without))


def test_sequences_of_padding_alone_do_not_dilute_the_sequence_wise_loss():
    scores, indices = np.full((2, 3, 4), 0.5), np.zeros((2, 3, 1), int)
    valid = np.array([[True] * 3, [False] * 3])
    assert sequence_wise_loss(scores, indices, valid) == sequence_wise_loss(scores[:1], indices[:1], valid[:1]) == 1.0
    assert sequence_wise_loss(scores, indices, np.zeros((2, 3), bool)) == 0.0


def test_bias_step_compares_loads_as_integers_and_leaves_an_even_load_alone():
    counts = 2**53 + np.arange(3)  # the middle one is the mean, and float64 cannot represent it
    np.testing.assert_array_equal(sign_bias_update(np.zeros(3), counts, 1e-3), [1e-3, 0.0, -1e-3])
    np.testing.assert_array_equal(sign_bias_update(np.array([0.1, 0.2]), np.array([7, 7]), 1e-3), [0.1, 0.2])
    assert max_violation(np.array([2, 2, 2])) == 0.0 == max_violation(np.zeros(3, int))


def test_numerical_gradient_is_the_known_one():
    x = np.array([[0.3, -1.2], [0.5, 2.0]])
    np.testing.assert_allclose(numerical_gradient(lambda y: float(np.sum(y**3)), x), 3 * x**2, rtol=1e-8)
