"""Prompts in chunks, then token by token: logits equal the plain forward pass, and the cache is as small as it can be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.decode import extend, make_cache, padded, prefill, project
from oracles.cases import CASES, load_case
from oracles.decoding import VOCABULARY, reference_logits, served, tiny

SIZE = 32
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCABULARY, n).tolist() for n in (1, 6, 11)]
MORE = RNG.integers(0, VOCABULARY, (3, 9))
KINDS = {"mla": {"yarn": True}, "gqa": {"attention": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2}}


def bytes_of(cache):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))


@functools.cache
def step(config):
    """One more token of each sequence: its logits, and the cache."""

    def run(model, rows, token_B, start_B):
        stream, rows = extend(model, rows, token_B[:, None], start_B, config, absorbed=True)
        return project(model, stream.normed_BTD[:, 0]), rows

    return jax.jit(run)


def decoded(tiny_model, prompts, more, chunk, size=SIZE):
    """Logits [B, 1 + N, V] after each prompt and after each of N more tokens; the cache begins full of other numbers."""
    config, model = tiny_model.config, tiny_model.model
    cache = jax.tree.map(lambda a: jnp.full_like(a, 1e30), make_cache(config, len(prompts), size))
    batch = padded(prompts, chunk)
    done = prefill(model, cache, batch, config, chunk=chunk)
    logits, rows = [project(model, done.hidden_BD)], done.cache.layers
    for i in range(more.shape[1]):
        new, rows = step(config)(model, rows, jnp.asarray(more[:, i], jnp.int32), jnp.asarray(batch.length_B + i))
        logits.append(new)
    return np.stack(logits, axis=1)


SLOW = (pytest.param(*case, marks=pytest.mark.slow) for case in (("gqa", 5), ("mla", 16)))


@pytest.mark.parametrize(("kind", "chunk"), [("mla", 4), *SLOW])
def test_logits_of_every_position_equal_the_plain_forward_pass(kind, chunk):
    """Prompts of different lengths in chunks that divide none of them; what is decoded is given."""
    model = tiny(**KINDS[kind])
    got = decoded(model, PROMPTS, MORE, chunk)
    for prompt, more, logits in zip(PROMPTS, MORE, got, strict=True):
        expected = reference_logits(model, [*prompt, *more])[len(prompt) - 1 :]
        # float32 against float64
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_the_released_model_caches_576_numbers_of_two_bytes_a_token_and_layer():
    def cache(batch, size, depths=0):
        return jax.eval_shape(lambda: make_cache(ModelConfig(), batch, size, depths=depths))

    assert bytes_of(cache(3, 1000)) == 3 * 1000 * 61 * (512 + 64) * 2
    assert bytes_of(cache(1, 1)) == 70_272
    assert bytes_of(cache(3, 1000, depths=1)) == 3 * 1000 * 62 * (512 + 64) * 2


def test_decoding_holds_nothing_but_the_cache_and_never_two_of_it():
    model = tiny(yarn=True)
    cache = make_cache(model.config, 3, SIZE)
    done = prefill(model.model, cache, padded(PROMPTS, 4), model.config, chunk=4)
    assert jax.tree.map(jnp.shape, done.cache) == jax.tree.map(jnp.shape, make_cache(model.config, 3, SIZE))
    assert all(rows.is_deleted() for rows in cache.layers)  # donated


def test_prompts_are_padded_to_whole_chunks():
    got = padded([[5], [1, 2, 3, 4, 5]], 4)
    assert got.tokens_BT.tolist() == [[5, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0]] and got.length_B.tolist() == [1, 5]
    assert padded([[1, 2, 3, 4]], 4).tokens_BT.shape == (1, 4)


@pytest.mark.parametrize(("prompts", "got"), [([], "none"), ([[1], []], "an empty one")])
def test_a_batch_without_a_token_is_refused(prompts, got):
    with pytest.raises(ValueError, match=f"^prompts: expected at least one token in each, got {got}$"):
        padded(prompts, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stored_cases_decode_to_the_stored_logits(name):
    """Within 1e-4, as another float32 implementation gave them."""
    case = load_case(name)
    ids, more = case.expected["input_ids"], case.expected["decode_ids"]
    model = served(case.config, case.tensors)
    chunk = 7  # divides no length of theirs
    size = -(-ids.shape[1] // chunk) * chunk + more.shape[1]
    got = decoded(model, ids.tolist(), more[:, :-1], chunk, size)
    assert (got.argmax(axis=-1) == more).all()
    np.testing.assert_allclose(got, case.expected["decode_logits"], atol=1e-4)
