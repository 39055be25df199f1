"""Measures of the latent against loops in NumPy float64, and a whole study against the reference model with other weights."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.analysis import latent
from dsv3_jax.fp8.formats import E5M6
from dsv3_jax.fp8.quantize import Quantiser
from dsv3_jax.inference.score import InMemory, Streamed
from dsv3_jax.interop.source import open_source
from dsv3_jax.model.module import init_variables
from dsv3_jax.presets import preset
from oracles import numpy_model
from oracles.cases import DATA, load_case
from oracles.numpy_attention import LATENT_EPS

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
# Whole, so that shares of energy are exact.
descending = st.lists(st.integers(0, 1000), min_size=1, max_size=12).map(lambda xs: np.array(sorted(xs)[::-1], np.float64))


# --- bytes ---


def test_cache_of_deepseek_v3_has_the_published_bytes():
    v3 = preset("deepseek_v3_671b").model
    found = [latent.cache_bytes(v3, scheme, None) for scheme in ("mla", "mqa", "gqa", "mha")]
    assert found == [70_272, 31_232, 249_856, 3_997_696]


def test_cache_in_narrow_formats_has_the_bytes_of_its_scales():
    v3 = preset("deepseek_v3_671b").model
    assert latent.cache_bytes(v3, "mla", Quantiser()) == 61 * (576 + 5 * 4)  # a float32 for each 128 channels, begun ones too
    assert latent.cache_bytes(v3, "mla", Quantiser(E5M6, power_of_two=True)) == 61 * (576 * 12 // 8 + 5)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 2), (16, 8), (128, 8)])
def test_compared_gqa_never_has_more_heads_than_the_model(heads, groups):
    assert latent.gqa_groups(preset("tiny").model.__class__(num_attention_heads=heads)) == groups


# --- spectra ---


@given(descending)
def test_effective_rank_is_the_exponential_of_the_entropy(singular):
    shares = [s / sum(singular) for s in singular.tolist()] if singular.any() else []
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    assert latent.effective_rank(singular) == pytest.approx(math.exp(entropy) if shares else 0)


@given(descending, st.sampled_from([50, 90, 99, 100]))
def test_directions_for_are_the_fewest_with_that_share(singular, percent):
    energies = [int(s) ** 2 for s in singular]
    enough = [r for r in range(1, len(energies) + 1) if 100 * sum(energies[:r]) >= percent * sum(energies)]
    assert latent.directions_for(singular, percent / 100) == (enough[0] if singular.any() else 0)


def test_spectra_take_rows_by_themselves():
    singular = np.array([[3.0, 0, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(latent.effective_rank(singular), [1, 3, 0])
    np.testing.assert_array_equal(latent.directions_for(singular, 0.9), [1, 3, 0])


def test_weight_spectra_are_those_of_each_head_s_keys_and_values():
    kv_b = RNG.standard_normal((5, 3, 4 + 6)).astype(np.float32)
    found = latent.weight_spectra(kv_b, 4)
    assert found.keys_HC.shape == (3, 4) and found.values_HC.shape == (3, 5)
    for head in range(3):
        for values, part in ((found.keys_HC, kv_b[:, head, :4]), (found.values_HC, kv_b[:, head, 4:])):
            gram = part.astype(np.float64) @ part.T.astype(np.float64)
            np.testing.assert_allclose(values[head] ** 2, np.linalg.eigvalsh(gram)[::-1][: values.shape[1]], atol=1e-12)
    whole = kv_b.reshape(5, -1).astype(np.float64)
    np.testing.assert_allclose(found.whole_C**2, np.linalg.eigvalsh(whole @ whole.T)[::-1])


def test_principal_directions_are_those_of_the_latents_singular_vectors():
    latents = RNG.standard_normal((2, 20, 4)) * np.array([1.0, 5.0, 0.1, 2.0]) + 3
    found = latent.principal(latent.second_moment(latents))
    _, singular, rows = np.linalg.svd(latents.reshape(40, 4))
    np.testing.assert_allclose(found.singular_C, singular / math.sqrt(40))
    np.testing.assert_allclose(np.abs((found.directions_CC * rows.T).sum(axis=0)), 1)


# --- fewer directions ---


def test_truncation_error_is_that_of_latents_projected():
    latents, weight = RNG.standard_normal((30, 6)) + 1, RNG.standard_normal((6, 9))
    basis = np.linalg.qr(RNG.standard_normal((6, 6)))[0]
    found = latent.truncation_error(weight, latent.second_moment(latents), basis)
    exact = latents @ weight
    for r in range(7):
        kept = latents @ basis[:, :r] @ basis[:, :r].T @ weight
        assert found[r] == pytest.approx(np.linalg.norm(kept - exact) / np.linalg.norm(exact), abs=1e-7)


def test_ranks_end_with_the_whole_latent():
    assert latent.ranks_of(16) == (1, 2, 4, 8, 12, 16)
    assert latent.ranks_of(1) == (1,) and latent.ranks_of(3) == (1, 2, 3)


# --- logits ---


def test_logit_parts_are_variances_over_the_keys_that_a_query_sees():
    batch, heads, length = 2, 3, 5
    q, k = (RNG.standard_normal((batch, heads, length, 4)) for _ in range(2))
    q_rope, k_rope = RNG.standard_normal((batch, heads, length, 2)), RNG.standard_normal((batch, 1, length, 2))
    found = latent.logit_parts(*(jnp.asarray(a, jnp.float32) for a in (q, q_rope, k, k_rope)), scale=0.7)
    for head in range(heads):
        expected = [[], [], []]
        for b in range(batch):
            for t in range(1, length):  # the first query sees one key, whose logit has no variance
                content = [0.7 * q[b, head, t] @ k[b, head, j] for j in range(t + 1)]
                rotary = [0.7 * q_rope[b, head, t] @ k_rope[b, 0, j] for j in range(t + 1)]
                for into, values in zip(expected, (content, rotary, np.add(content, rotary)), strict=True):
                    into.append(np.var(values))
        np.testing.assert_allclose([part[head] for part in found], [np.mean(values) for values in expected], rtol=1e-5)


# --- a model ---

RANKS, LENGTH = (3, 24), 14


@pytest.fixture(scope="module")
def wide():
    """A checkpoint whose values are wider than its keys: (study, config, tensors, tokens)."""
    case = load_case("wide")
    tokens = np.random.default_rng(3).integers(0, case.config["vocab_size"], (5, LENGTH))  # an odd one, which is left out
    source = open_source(DATA / "wide")
    found = latent.study(Streamed(source.tensors, source.config, "float32"), tokens, RANKS)
    return found, case.config, numpy_model.as_float64(case.tensors), tokens[:4]


def attention_inputs(tensors, config, tokens):
    """Of every layer's attention, [B, T, D]."""
    main = numpy_model.forward(tensors, config, tokens)
    before = [main["hidden_embed"], *(main[f"hidden_{i}"] for i in range(config["num_hidden_layers"] - 1))]
    gains = (tensors[f"model.layers.{i}.input_layernorm.weight"] for i in range(len(before)))
    return [numpy_model.rms_norm(x, gain, config["rms_norm_eps"]) for x, gain in zip(before, gains, strict=True)]


def latents_of(x_BTD, tensors, prefix, config):
    compressed = numpy_model.linear(x_BTD, tensors[f"{prefix}kv_a_proj_with_mqa.weight"])[..., : config["kv_lora_rank"]]
    return numpy_model.rms_norm(compressed, tensors[f"{prefix}kv_a_layernorm.weight"], LATENT_EPS)


def attended(x_BTD, tensors, prefix, config):
    length = x_BTD.shape[1]
    mask = numpy_model.attention_mask(length)
    return np.stack([numpy_model.mla(x, tensors, prefix, config, np.arange(length), mask) for x in x_BTD])


def relative(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def truncated_tensors(tensors, config, tokens, r):
    """Each layer's kv_b_proj behind the projection on the r leading directions of its latents over the first half."""
    changed = dict(tensors)
    for i, x_BTD in enumerate(attention_inputs(tensors, config, tokens[: len(tokens) // 2])):
        prefix = f"model.layers.{i}.self_attn."
        latents = latents_of(x_BTD, tensors, prefix, config).reshape(-1, config["kv_lora_rank"])
        basis = np.linalg.svd(latents)[2][:r].T
        changed[f"{prefix}kv_b_proj.weight"] = tensors[f"{prefix}kv_b_proj.weight"] @ basis @ basis.T
    return changed


def test_study_of_a_checkpoint_finds_the_reference_s_latents_and_losses(wide):
    found, config, tensors, tokens = wide
    held, heads, nope = tokens[2:], config["num_attention_heads"], config["qk_nope_head_dim"]
    for i, x_BTD in enumerate(attention_inputs(tensors, config, tokens)):
        prefix = f"model.layers.{i}.self_attn."
        latents = latents_of(x_BTD, tensors, prefix, config)
        singular = np.linalg.svd(latents[:2].reshape(-1, config["kv_lora_rank"]), compute_uv=False)
        np.testing.assert_allclose(found.latent_LC[i], singular / math.sqrt(2 * LENGTH), rtol=1e-4, atol=1e-6)
        kv_b = tensors[f"{prefix}kv_b_proj.weight"]
        np.testing.assert_allclose(found.weights[i].whole_C, np.linalg.svd(kv_b, compute_uv=False), rtol=1e-6)
        first_head = kv_b.reshape(heads, -1, config["kv_lora_rank"])[0, :nope]
        np.testing.assert_allclose(found.weights[i].keys_HC[0], np.linalg.svd(first_head, compute_uv=False), rtol=1e-6)
        for j, r in enumerate(RANKS):
            fewer = truncated_tensors(tensors, config, tokens, r)[f"{prefix}kv_b_proj.weight"]
            exact, kept = (latents[2:] @ w.reshape(heads, -1, w.shape[-1]).transpose(0, 2, 1)[:, None] for w in (kv_b, fewer))
            # Directions are those of float32 latents; what all of them leave is rounding's square root.
            close = {"rel": 1e-3, "abs": 1e-6}
            assert found.keys_LR[i, j] == pytest.approx(relative(kept[..., :nope], exact[..., :nope]), **close)
            assert found.values_LR[i, j] == pytest.approx(relative(kept[..., nope:], exact[..., nope:]), **close)
            outputs = (
                attended(x_BTD[2:], t, prefix, config) for t in (tensors | {f"{prefix}kv_b_proj.weight": fewer}, tensors)
            )
            assert found.outputs_LR[i, j] == pytest.approx(relative(*outputs), **close)
    assert found.absorbed_L.max() < 1e-6
    for r, nll in zip((None, *RANKS), (found.nll_N, *found.nll_RN), strict=True):
        weights = tensors if r is None else truncated_tensors(tensors, config, tokens, r)
        logits = numpy_model.forward(weights, config, held)["logits"][:, :-1]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = -np.take_along_axis(log_p, held[:, 1:, None], axis=-1)[..., 0]
        np.testing.assert_allclose(nll.reshape(2, LENGTH - 1), expected, rtol=1e-4)


def test_costs_of_truncation_are_paired_by_token(wide):
    found = wide[0]
    difference = found.nll_RN[0] - found.nll_N
    assert found.more_R[0] == pytest.approx(difference.mean())
    assert found.error_R[0] == pytest.approx(math.sqrt(difference.var() / (2 * (LENGTH - 1))))


def test_logits_of_a_study_are_rotated_and_scaled(wide):
    found, config, tensors, tokens = wide
    prefix, d_n = "model.layers.0.self_attn.", config["qk_nope_head_dim"]
    frequencies, positions, width = numpy_model.rope_frequencies(config), np.arange(LENGTH), config["kv_lora_rank"]
    content, rotary = [], []
    for x_TD in attention_inputs(tensors, config, tokens)[0][:2]:
        c_q = numpy_model.rms_norm(x_TD @ tensors[f"{prefix}q_a_proj.weight"].T, tensors[f"{prefix}q_a_layernorm.weight"], 1e-6)
        q = (c_q @ tensors[f"{prefix}q_b_proj.weight"].T)[:, : d_n + config["qk_rope_head_dim"]]  # of the first head
        k = latents_of(x_TD, tensors, prefix, config) @ tensors[f"{prefix}kv_b_proj.weight"][:d_n].T
        k_rope = (x_TD @ tensors[f"{prefix}kv_a_proj_with_mqa.weight"].T)[:, width:]
        q_rope, k_rope = (numpy_model.rotate(a, positions, frequencies) for a in (q[:, d_n:], k_rope))
        scale = numpy_model.softmax_scale(config)
        for into, scores in ((content, scale * q[:, :d_n] @ k.T), (rotary, scale * q_rope @ k_rope.T)):
            into += [np.var(scores[t, : t + 1]) for t in range(1, LENGTH)]
    assert found.logits_L[0].content_H[0] == pytest.approx(np.mean(content), rel=1e-4)
    assert found.logits_L[0].rotary_H[0] == pytest.approx(np.mean(rotary), rel=1e-4)


# --- refusals ---


def supply_of(**fields):
    config = preset("tiny").model.__class__(**{**vars(preset("tiny").model), "num_nextn_predict_layers": 0, **fields})
    variables = init_variables(config)
    return InMemory(variables.params, variables.bias_LE, config)


@pytest.mark.parametrize(
    ("fields", "shape", "ranks", "said"),
    [
        ({"attention": "gqa"}, (2, 4), None, r"attention: expected mla, .*, got gqa; name another model"),
        ({}, (1, 4), None, r"tokens: expected two sequences of two tokens at least, got \[1, 4\]; cut a long one"),
        ({}, (2, 1), None, r"tokens: expected two sequences"),
        ({}, (2, 4), (), r"ranks: expected numbers from 1 to 16, .*, got \[\]"),
        ({}, (2, 4), (0, 4), r"ranks: expected numbers from 1 to 16"),
        ({}, (2, 4), (4, 17), r"ranks: expected numbers from 1 to 16"),
    ],
)
def test_what_cannot_be_studied_is_refused_in_one_line(fields, shape, ranks, said):
    with pytest.raises(ValueError, match=said) as error:
        latent.study(supply_of(**fields), np.ones(shape, np.int64), ranks)
    assert "\n" not in str(error.value)


def test_tokens_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"tokens: expected 0\.\.1023, got 1024"):
        latent.study(supply_of(), np.full((2, 4), 1024))
