"""The JAX model in float32 reproduces the stored cases: every hidden state, choice, loss and gradient.

Two correct float32 implementations differ by some 1.5e-5 in logits of standard deviation 1.5 (tests/oracles/data/README.md), so
4e-5 there; in the residual stream, whose entries reach 10, 1e-4. Losses near 7 have a float32 spacing of 5e-7.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import attention
from dsv3_jax.model.transformer import block, document_positions, embed, forward, logits, make_context
from dsv3_jax.training.loss import cross_entropy
from oracles import numpy_model
from oracles.cases import CASES, load_case
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config, released_gradients
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors

LOGITS, HIDDEN, CHUNK = 4e-5, 1e-4, 7


@functools.cache
def loaded(name):
    released, tensors, expected = load_case(name)
    config = model_config(released)
    return config, *from_checkpoint(tensors, config), jnp.asarray(expected["input_ids"], jnp.int32), expected


def next_token_loss(params, bias, tokens, config):
    """Mean cross entropy of the main model, through the chunked loss of training, and all that led to it."""
    context = make_context(jnp.ones_like(tokens), config, cross_document=True)
    hidden = forward(params, bias, tokens, context, config)
    targets, weights = jnp.roll(tokens, -1, axis=1), jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)
    total, _ = cross_entropy(hidden.normed_BTD, params["lm_head"], targets, weights, CHUNK)
    return total / weights.sum(), hidden


def layer_by_layer(params, bias, tokens, config, *, halves):
    """What the scan does not hand out: `hidden_{i}` and, with `halves`, `attn_out_{i}`, `mlp_out_{i}`."""
    context = make_context(jnp.ones_like(tokens), config, cross_document=True)
    x, kept = embed(params, tokens, config), {}
    for i in range(config.num_hidden_layers):
        dense = i < config.n_dense_layers
        stack, row = ("dense_layers", i) if dense else ("moe_layers", i - config.n_dense_layers)
        weights = jax.tree.map(lambda a, row=row: a[row], params[stack])
        after, _ = block(weights, None if dense else bias[row], x, context, config)
        kept[f"hidden_{i}"] = after
        if halves:
            normed = rms_norm(x, weights["input_layernorm"], config.rms_norm_eps)
            attended = attention(weights["self_attn"], normed, context.rope, context.segments_BT, config)
            kept |= {f"attn_out_{i}": attended, f"mlp_out_{i}": after - x - attended}
        x = after
    return kept


# Tests are grouped by a module-wide fixture's parameter, so that one worker compiles a case once for all of them.
name = pytest.fixture(scope="module", params=CASES)(lambda request: request.param)


@functools.cache
def run_case(name):
    """One compilation a case: loss, logits, hidden states, routing, and gradients where they are stored."""
    config, params, bias, tokens, expected = loaded(name)

    def everything(params):
        (loss, hidden), grads = jax.value_and_grad(next_token_loss, has_aux=True)(params, bias, tokens, config)
        kept = layer_by_layer(params, bias, tokens, config, halves="attn_out_0" in expected)
        return loss, hidden, logits(params, hidden.normed_BTD, config), grads, kept

    return quick_jit(everything)(params)


def test_stored_hidden_states_and_logits_are_reproduced(name):
    expected = loaded(name)[-1]
    _, hidden, actual_logits, _, kept = run_case(name)
    kept |= {"hidden_final": hidden.normed_BTD, f"hidden_{loaded(name)[0].num_hidden_layers - 1}": hidden.residual_BTD}
    compared = [key for key in expected if key in kept]
    assert len(compared) >= 4
    for key in compared:
        np.testing.assert_allclose(kept[key], expected[key], rtol=0, atol=HIDDEN, err_msg=key)
    np.testing.assert_allclose(actual_logits, expected["logits"], rtol=0, atol=LOGITS)


def test_stored_choices_are_reproduced_exactly_and_gates_closely(name):
    expected, routing = loaded(name)[-1], run_case(name)[1].layers
    for row, layer in enumerate((1, 2)):
        order = np.argsort(routing.indices[row], axis=-1)
        indices, gates = (np.take_along_axis(np.asarray(a[row]), order, -1) for a in (routing.indices, routing.gates))
        np.testing.assert_allclose(routing.logits[row], expected[f"router_logits_{layer}"], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(indices, expected[f"topk_idx_{layer}"])
        np.testing.assert_allclose(gates, expected[f"topk_w_{layer}"], rtol=0, atol=5e-6)


def test_stored_loss_is_reproduced(name):
    assert float(run_case(name)[0]) == pytest.approx(float(loaded(name)[-1]["loss"]), abs=3e-6)


def test_stored_gradient_of_every_tensor_is_reproduced(name):
    config, *_, expected = loaded(name)
    tensors = load_case(name).tensors
    gradients = released_gradients(run_case(name)[3], tensors, config)
    stored_norms = dict(zip(expected["grad_names"], expected["grad_norms"], strict=True))
    stored_slopes = dict(zip(expected["grad_names"], expected["grad_dot_w"], strict=True))
    assert set(stored_norms) <= set(gradients)
    for tensor, norm in stored_norms.items():
        gradient, weight = gradients[tensor].astype(np.float64), np.asarray(tensors[tensor], np.float64)
        assert np.linalg.norm(gradient) == pytest.approx(float(norm), rel=1e-4, abs=1e-8), tensor
        # A sum of terms that cancel: its error is relative to the product of the norms, not to the sum.
        slope, scale = float((gradient * weight).sum()), float(norm) * np.linalg.norm(weight)
        assert slope == pytest.approx(float(stored_slopes[tensor]), rel=1e-4, abs=1e-5 * scale), tensor


KINDS = {
    "mla": {},
    "without_q_lora_wide_values": {"q_lora_rank": None, "v_head_dim": 9},
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa_two_shared_v2_router": {
        "attention": "mqa", "num_key_value_heads": 1, "scoring_func": "softmax", "norm_topk_prob": False,
        "topk_method": "group_limited_greedy", "n_shared_experts": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_random_model_on_packed_documents_equals_the_float64_reference(kind):
    """Isolated documents and padding too. Positions restart here and not in the reference: rotary scores cannot tell."""
    released = SMALL_CONFIG | KINDS[kind]
    config, tensors = model_config(released), random_tensors(released, seed=11)
    params, bias = from_checkpoint(tensors, config)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, released["vocab_size"], (2, 9)).astype(np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 2, 2, 0, 0]], np.int32)

    def run(params):
        context = make_context(jnp.asarray(segments), config, cross_document=False)
        return forward(params, bias, jnp.asarray(tokens), context, config)

    expected, actual = numpy_model.forward(tensors, released, tokens, segments), quick_jit(run)(params)
    record = expected["routing"][1]
    assert min(record["margin"].min(), record["group_margin"].min()) > 1e-5  # else rounding could decide
    np.testing.assert_array_equal(actual.layers.indices[0], record["indices"])
    np.testing.assert_allclose(actual.normed_BTD, expected["hidden_final"], rtol=0, atol=2e-5)


def test_packed_documents_equal_each_document_alone():
    released = SMALL_CONFIG
    config = model_config(released)
    params, bias = from_checkpoint(random_tensors(released, seed=3), config)
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 50, (1, 10)), jnp.int32)
    segments = jnp.asarray([[1] * 4 + [2] * 6], jnp.int32)

    def run(tokens, segments):
        return forward(params, bias, tokens, make_context(segments, config, cross_document=False), config).normed_BTD

    packed = quick_jit(run)(tokens, segments)
    for document in (slice(0, 4), slice(4, 10)):
        alone = quick_jit(run)(tokens[:, document], segments[:, document])
        np.testing.assert_allclose(packed[:, document], alone, rtol=0, atol=1e-5)  # float32 sums in another order


def test_documents_see_each_other_only_when_told_so():
    """What the last token of a row sees, by what its state changes with."""
    config = model_config(SMALL_CONFIG)
    params, bias = from_checkpoint(random_tensors(SMALL_CONFIG, seed=3), config)
    tokens, segments = jnp.asarray([[3, 4, 5, 6]] * 3, jnp.int32), jnp.asarray([[1, 1, 2, 2]] * 3, jnp.int32)
    tokens = tokens.at[1, 0].set(9).at[2, 2].set(9)  # row 1 differs in the first document, row 2 in the second

    def last_state(tokens, *, cross_document):
        context = make_context(segments, config, cross_document=cross_document)
        return forward(params, bias, tokens, context, config).normed_BTD[:, -1]

    states = (quick_jit(functools.partial(last_state, cross_document=flag))(tokens) for flag in (True, False))
    together, apart = (np.asarray(state) for state in states)
    assert np.abs(together[1] - together[0]).max() > 1e-3 and np.abs(together[2] - together[0]).max() > 1e-3
    np.testing.assert_array_equal(apart[1], apart[0])
    assert np.abs(apart[2] - apart[0]).max() > 1e-3


def test_positions_restart_where_the_segment_changes():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [5, 1, 5, 5, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(document_positions(segments), [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 0, 1, 2]])
