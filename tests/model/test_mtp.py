"""Multi-token prediction against the stored module, the known alignment and the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.mtp import mtp_forward, predicts_within_document, shifted
from dsv3_jax.model.transformer import forward, logits, make_context
from dsv3_jax.training.loss import cross_entropy
from oracles import checks_mtp, numpy_model, vectors
from oracles.cases import load_case
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors


def run_mtp(params, bias, tokens, segments, config, *, cross_document=False):
    context = make_context(segments, config, cross_document=cross_document)
    main = forward(params, bias, tokens, context, config)
    depths = mtp_forward(params, bias, tokens, main, context, config)
    return [(d.residual_BTD, d.layer, logits(params, d.normed_BTD, config)) for d in depths]


@functools.cache
def run_stored():
    released, tensors, expected = load_case("mtp")
    config = model_config(released)
    params, bias = from_checkpoint(tensors, config)
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    ((hidden, routing, module_logits),) = quick_jit(lambda p: run_mtp(p, bias, tokens, jnp.ones_like(tokens), config))(params)
    return hidden, routing, module_logits, expected


def test_stored_module_is_reproduced():
    hidden, routing, module_logits, expected = run_stored()
    known = expected["mtp_hidden"].shape[1]  # the last position has no next token to embed
    np.testing.assert_allclose(hidden[:, :known], expected["mtp_hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(module_logits[:, :known], expected["mtp_logits"], rtol=0, atol=4e-5)
    indices = np.asarray(routing.indices[:, :known])
    order = np.argsort(indices, axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(indices, order, -1), expected["mtp_topk_idx"])
    gates = np.take_along_axis(np.asarray(routing.gates[:, :known]), order, -1)
    np.testing.assert_allclose(gates, expected["mtp_topk_w"], rtol=0, atol=5e-6)


def test_stored_loss_of_the_module_is_reproduced():
    released, tensors, expected = load_case("mtp")
    tokens = expected["input_ids"].astype(np.int32)
    # Stored without the label after the last input: position i predicts token i+2, two short of the end.
    targets, valid = numpy_model.aligned_targets(tokens, tokens.shape[1], 1)
    loss = numpy_model.cross_entropy(np.asarray(run_stored()[2]), targets, valid)
    assert loss == pytest.approx(float(expected["mtp_loss"]), abs=3e-6)


def test_stored_input_of_the_module_is_reproduced(monkeypatch):
    """`mtp_input` is what eh_proj gives: seen by a block that adds nothing."""
    import dsv3_jax.model.mtp as mtp

    released, tensors, expected = load_case("mtp")
    config = model_config(released)
    params, bias = from_checkpoint(tensors, config)
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    final = jnp.asarray(expected["hidden_final"], jnp.float32)
    monkeypatch.setattr(mtp, "block", lambda weights, bias_E, x, context, config, forced: (x, None))
    weights = jax.tree.map(lambda a: a[0], params["mtp"])
    embedded = params["embed_tokens"][mtp.shifted(tokens, 1)]
    context = make_context(jnp.ones_like(tokens), config, cross_document=True)
    actual, _ = mtp.module(weights, bias[-1], final, embedded, context, config)
    known = expected["mtp_input"].shape[1]
    np.testing.assert_allclose(actual[:, :known], expected["mtp_input"], rtol=0, atol=1e-4)


def test_positions_predict_the_known_targets_and_read_the_known_embedding():
    checks_mtp.check_known_alignment()


def test_targets_stay_within_documents_and_out_of_padding():
    checks_mtp.check_targets_within_documents()


@pytest.mark.parametrize("hidden, concat", [("post_norm", "embedding_first"), ("pre_norm", "hidden_first")])
def test_chain_of_three_modules_on_packed_documents_equals_the_float64_reference(hidden, concat):
    released = SMALL_CONFIG | {"num_nextn_predict_layers": 3}
    config = model_config(released, mtp_hidden=hidden, mtp_concat=concat)
    tensors = random_tensors(released, seed=21)
    params, bias = from_checkpoint(tensors, config)
    tokens = np.random.default_rng(5).integers(0, released["vocab_size"], (2, 10)).astype(np.int32)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2, 2, 0, 0]], np.int32)
    length = tokens.shape[1] - 1
    main = numpy_model.forward(tensors, released, tokens[:, :length], segments[:, :length])
    expected = numpy_model.mtp_forward(
        tensors, released, main, tokens, segments,
        hidden_after_norm=hidden == "post_norm", embedding_first=concat == "embedding_first",
    )  # fmt: skip

    actual = quick_jit(lambda p: run_mtp(p, bias, jnp.asarray(tokens[:, :-1]), jnp.asarray(segments[:, :-1]), config))(params)
    for k, (module, (_, routing, module_logits)) in enumerate(zip(expected, actual, strict=True), start=1):
        # Only where the module has a target: elsewhere the embedding that it joins is another document's or missing.
        targets, valid = numpy_model.aligned_targets(tokens, length, k, segments)
        ours = np.asarray(predicts_within_document(jnp.asarray(segments), k))
        np.testing.assert_array_equal(ours, valid)
        known = module["logits"].shape[1]
        assert not valid[:, known:].any() and valid.any()
        where = valid[:, :known]
        np.testing.assert_allclose(
            np.asarray(module_logits)[:, :known][where], module["logits"][where], rtol=0, atol=1e-4, err_msg=f"depth {k}"
        )
        np.testing.assert_array_equal(np.asarray(routing.indices)[:, :known][where], module["routing"]["indices"][where])
        np.testing.assert_array_equal(np.asarray(shifted(jnp.asarray(tokens), k + 1))[:, :-1][valid], targets[valid])


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_no_target_exists_past_the_end_of_the_window(depth):
    segments = jnp.ones((1, 5), jnp.int32)
    assert int(predicts_within_document(segments, depth).sum()) == 4 - depth


def test_embedding_and_head_are_shared_and_receive_gradients_from_the_module():
    """A loss of depth 1 alone reaches the embedding, the head and the main model below."""
    released = SMALL_CONFIG | {"num_nextn_predict_layers": 1}
    config = model_config(released)
    params, bias = from_checkpoint(random_tensors(released, seed=8), config)
    tokens = jnp.asarray(vectors.MTP_TOKENS, jnp.int32)

    def loss(params):
        context = make_context(jnp.ones_like(tokens[:, :-1]), config, cross_document=True)
        main = forward(params, bias, tokens[:, :-1], context, config)
        (depth,) = mtp_forward(params, bias, tokens[:, :-1], main, context, config)
        weights = predicts_within_document(jnp.ones_like(tokens), 1).astype(jnp.float32)
        return cross_entropy(depth.normed_BTD, params["lm_head"], shifted(tokens, 2)[:, :-1], weights, 2)[0]

    gradients = quick_jit(jax.grad(loss))(params)
    untouched = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(gradients) if not (g != 0).any()]
    assert untouched == []
