"""Scores against stored outputs of another implementation: whole in memory, streamed, and on a mesh."""

import functools
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.fp8.precision import SERVING
from dsv3_jax.inference.loaded import load
from dsv3_jax.inference.score import Scores, Streamed, check_tokens, score, write_scores
from dsv3_jax.interop.source import open_source
from oracles.cases import CASES, DATA, load_case
from oracles.layouts import placement_of
from oracles.numpy_model import forward, mtp_forward
from oracles.released_folder import multiplied_out, released_config, released_tensors, write_folder

# Two correct float32 implementations differ by 1.5e-5 in logits of standard deviation 1.5, in the residual stream by 5e-5.
LOGITS, HIDDEN, GATES = 4e-5, 1e-4, 5e-6


def streamed(folder, tokens, dtype="float32", placement=None, **options):
    source = open_source(folder, compute_dtype=dtype, **options)
    return score(Streamed(source.tensors, source.config, dtype, placement), tokens)


@functools.cache
def streamed_case(name):
    return streamed(DATA / name, load_case(name).expected["input_ids"])


def same_bits(a: Scores, b: Scores):
    for name, left, right in zip(Scores._fields, a, b, strict=True):
        if left is None:
            assert right is None, name
        else:
            np.testing.assert_array_equal(left, right, err_msg=name)


FAST = ("base", "fp8", "mtp")  # the whole model's tests compute all of them too


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in CASES])
def test_streamed_scores_are_the_stored_ones(name):
    config, _, expected = load_case(name)
    scores, first = streamed_case(name), config["first_k_dense_replace"]
    np.testing.assert_allclose(scores.logits, expected["logits"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(scores.hidden, expected["hidden_final"], rtol=0, atol=HIDDEN)
    assert scores.router_indices.dtype == np.int32 and len(scores.router_indices) == config["num_hidden_layers"] - first
    for i, (indices, gates) in enumerate(zip(scores.router_indices, scores.router_weights, strict=True), first):
        order = np.argsort(indices, axis=-1)
        np.testing.assert_array_equal(np.take_along_axis(indices, order, -1), expected[f"topk_idx_{i}"])
        np.testing.assert_allclose(np.take_along_axis(gates, order, -1), expected[f"topk_w_{i}"], rtol=0, atol=GATES)


def test_streamed_mtp_scores_are_the_stored_ones_and_unused_rows_are_empty():
    expected, scores = load_case("mtp").expected, streamed_case("mtp")
    np.testing.assert_allclose(scores.mtp_logits[0, :, :-1], expected["mtp_logits"], rtol=0, atol=LOGITS)
    np.testing.assert_array_equal(np.sort(scores.mtp_router_indices[0, :, :-1], axis=-1), expected["mtp_topk_idx"])
    assert np.isnan(scores.mtp_logits[0, :, -1]).all() and (scores.mtp_router_indices[0, :, -1] == -1).all()


@pytest.mark.parametrize("name", ["mtp", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_whole_model_in_memory_gives_the_same_numbers(name):
    whole = load(DATA / name).score(load_case(name).expected["input_ids"])
    if name == "mtp":  # the same program
        same_bits(whole, streamed_case(name))
    np.testing.assert_allclose(whole.logits, streamed_case(name).logits, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(whole.router_indices, streamed_case(name).router_indices)


def test_choices_are_by_descending_biased_score():
    _, tensors, expected = load_case("base")
    scores = streamed_case("base")
    for row, layer in enumerate((1, 2)):
        bias = tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        biased = 1 / (1 + np.exp(-expected[f"router_logits_{layer}"].astype(np.float64))) + bias
        chosen = np.take_along_axis(biased, scores.router_indices[row], axis=-1)
        assert (np.diff(chosen, axis=-1) < 1e-6).all()  # rounding of the stored logits


def test_ties_go_to_the_lower_id(tmp_path):
    released = released_config(num_hidden_layers=1, first_k_dense_replace=0, n_group=1, topk_group=1)
    tensors = released_tensors(released, 0)
    tensors["model.layers.0.mlp.gate.weight"][:] = 0
    tensors["model.layers.0.mlp.gate.e_score_correction_bias"][:] = [0, 1, 0, 1, 0, 0, 1, 1]
    write_folder(tmp_path, released, tensors)
    assert streamed(tmp_path, np.array([[1, 2]])).router_indices.tolist() == [[[[1, 3, 6]] * 2]]


VARIANTS = {
    "two depths, no dense layer": {"num_nextn_predict_layers": 2, "first_k_dense_replace": 0},
    "dense layers alone": {"first_k_dense_replace": 2},
    "tied, no query compression": {"tie_word_embeddings": True, "q_lora_rank": None, "num_nextn_predict_layers": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_is_scored_as_the_reference_scores_it(tmp_path, variant):
    released = released_config(**VARIANTS[variant])
    stored = released_tensors(released, 3)
    write_folder(tmp_path, released, stored)
    tokens = np.random.default_rng(0).integers(0, released["vocab_size"], (2, 7))
    tensors = {"lm_head.weight": stored["model.embed_tokens.weight"]} | stored
    main, scores = forward(tensors, released, tokens), streamed(tmp_path, tokens)
    np.testing.assert_allclose(scores.logits, main["logits"], rtol=0, atol=LOGITS)
    for row, record in enumerate(main["routing"].values()):
        np.testing.assert_array_equal(scores.router_indices[row], record["indices"])
    assert len(scores.router_indices) == len(main["routing"])
    if not released["num_nextn_predict_layers"]:
        assert scores.mtp_logits is None and scores.mtp_router_indices is None
        return
    for k, module in enumerate(mtp_forward(tensors, released, main, tokens), 1):
        np.testing.assert_allclose(scores.mtp_logits[k - 1, :, :-k], module["logits"], rtol=0, atol=LOGITS)
        np.testing.assert_array_equal(scores.mtp_router_indices[k - 1, :, :-k], module["routing"]["indices"])
        assert np.isnan(scores.mtp_logits[k - 1, :, -k:]).all()
    assert streamed(tmp_path, tokens, mtp=False).mtp_logits is None


@pytest.mark.slow
def test_bfloat16_is_near_and_streams_as_it_loads():
    tokens = load_case("mtp").expected["input_ids"]
    whole, stream = load(DATA / "mtp", dtype="bfloat16").score(tokens), streamed(DATA / "mtp", tokens, "bfloat16")
    same_bits(whole, stream)
    difference = whole.logits - load_case("mtp").expected["logits"]
    # Eight bits of mantissa through three layers, and some tokens routed to other experts.
    assert 1e-3 < np.sqrt((difference**2).mean()) < 0.15 * load_case("mtp").expected["logits"].std()


MESHES = {"report": {}, "fully_sharded": {}, "tensor_expert": {"mesh_tensor": 2}}


@pytest.mark.parametrize("layout", ["fully_sharded", "tensor_expert"])
def test_a_mesh_that_cuts_matrices_does_not_serve_fp8_as_stored(layout):
    source = open_source(DATA / "fp8")
    config = replace(source.config, fp8=SERVING)
    with pytest.raises(ValueError, match="--fp8: expected a layout that only divides experts, got one that cuts matrices"):
        Streamed(source.tensors, config, "float32", placement_of(layout, config.n_routed_experts, **MESHES[layout]))
    assert Streamed(source.tensors, config, "float32", placement_of("report", config.n_routed_experts)).placement


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("layout", MESHES)
def test_a_mesh_gives_the_scores_of_one_device(tmp_path, layout, fp8):
    released = released_config(num_nextn_predict_layers=1, moe_intermediate_size=16, vocab_size=48, q_lora_rank=16)
    stored = released_tensors(released, 5, dtype=ml_dtypes.bfloat16, fp8=np.float32 if fp8 else None)
    write_folder(tmp_path, released, stored)
    tokens = np.random.default_rng(0).integers(0, 48, (3, 6))  # three rows: ranks without a row of their own
    main = forward(multiplied_out(stored), released, tokens)
    placement = placement_of(layout, 8, **MESHES[layout])
    assert placement.mesh.size == 8
    scores = streamed(tmp_path, tokens, placement=placement)
    np.testing.assert_allclose(scores.logits, main["logits"], rtol=0, atol=LOGITS)
    np.testing.assert_array_equal(scores.router_indices[0], main["routing"][1]["indices"])
    (module,) = mtp_forward(multiplied_out(stored), released, main, tokens)
    np.testing.assert_allclose(scores.mtp_logits[0, :, :-1], module["logits"], rtol=0, atol=LOGITS)
    np.testing.assert_array_equal(scores.mtp_router_indices[0, :, :-1], module["routing"]["indices"])
    if layout == "report":
        supply = Streamed(*open_source(tmp_path, compute_dtype="float32")[:2], "float32", placement)
        (_, (experts, _), *_) = supply.layers()
        up = experts["mlp"]["experts"]["up_proj"]
        for part in jax.tree.leaves(up):
            assert {shard.data.shape[0] for shard in part.addressable_shards} == {1}
            assert part.dtype == (ml_dtypes.float8_e4m3fn if fp8 and part.ndim == 3 and part.shape[1] > 1 else np.float32)


@pytest.mark.slow
def test_a_model_loaded_on_a_mesh_scores_too(tmp_path):
    placement = placement_of("report", 16)
    expected = load_case("base").expected
    scores = load(DATA / "base", placement=placement).score(expected["input_ids"])
    np.testing.assert_allclose(scores.logits, expected["logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([1, 2]), r"expected integers \[batch, seq\], got int64 \[2\]"),
        (np.array([[1.0]]), "got float64"),
        (np.zeros((2, 0), int), "at least one token"),
        (np.array([[0, 512]]), r"expected 0\.\.511, got 512"),
        (np.array([[-1]], np.int8), "got -1"),
        (np.array([[2**64 - 1]], np.uint64), "expected 0..511"),
    ],
)
def test_what_is_no_token_is_refused(tokens, message):
    config = open_source(DATA / "base").config
    with pytest.raises(ValueError, match=message) as error:
        check_tokens(tokens, config)
    assert "\n" not in str(error.value)


def test_scores_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    scores, path = streamed_case("mtp"), tmp_path / "scores.npz"
    write_scores(path, scores)
    with np.load(path) as stored:
        assert set(stored.files) == set(Scores._fields)
        np.testing.assert_array_equal(stored["router_indices"], scores.router_indices)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"some")
        raise OSError("full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError):
        write_scores(path, scores)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
