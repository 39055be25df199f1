"""The n-grams are proper distributions, agree with a slow reference, and know nothing of held-out text."""

import json
import lzma
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import baselines, build_data
from oracles.texts import VOCAB_SIZE, invented

TEXTS = [invented("prose", seed).encode() for seed in range(12)] + [bytes(range(256)), b"", b"x"]
TABLES = baselines.fit(TEXTS, 5)


def reference(texts: list[bytes], order: int, text: bytes) -> list[float]:
    """Witten-Bell straight from its formula, with dictionaries."""
    counts = Counter(t[i : i + n] for n in range(1, order + 1) for t in texts for i in range(len(t) - n + 1))
    out = []
    for i, byte in enumerate(text):
        p = 1 / 256
        for n in range(1, min(order, i + 1) + 1):
            context = text[i - n + 1 : i]
            after = [counts[context + bytes([b])] for b in range(256)]
            total, types = sum(after), sum(c > 0 for c in after)
            if total:
                p = (after[byte] + types * p) / (total + types)
        out.append(p)
    return out


def test_probabilities_agree_with_a_slow_reference():
    text = TEXTS[3][:60] + b"zz\xff" + invented("verse", 1).encode()[:60]
    for order in (1, 2, 5):
        # Both are float64 in the same order of operations: only the last bits may differ.
        np.testing.assert_allclose(baselines.probabilities(TABLES[:order], text), reference(TEXTS, order, text), rtol=1e-12)


@settings(max_examples=10)
@given(st.binary(max_size=6), st.integers(1, 5))
def test_the_next_byte_has_a_distribution_that_sums_to_one_in_every_context(context, order):
    p = [baselines.probabilities(TABLES[:order], context + bytes([byte]))[-1] for byte in range(256)]
    assert min(p) > 0
    assert sum(p) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("context", [b"", b"the v", b"nobody in th", b"\xff\xfe\xfd", b"zqzq"])
def test_seen_and_unseen_contexts_sum_to_one(context):
    p = [baselines.probabilities(TABLES, context + bytes([byte]))[-1] for byte in range(256)]
    assert sum(p) == pytest.approx(1, abs=1e-12)


def test_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK_BYTES", 500)
    for small, large in zip(baselines.fit(TEXTS, 5), TABLES, strict=True):
        for name in ("grams", "counts", "contexts", "context_counts", "followers"):
            np.testing.assert_array_equal(getattr(small, name), getattr(large, name))


def test_no_gram_spans_two_texts():
    tables = baselines.fit([b"ab", b"cd"], 2)
    assert [int(g).to_bytes(2, "big") for g in tables[1].grams] == [b"ab", b"cd"]


def test_longer_contexts_help_on_text_like_the_training_text():
    texts = [invented("prose", seed).encode() for seed in range(100, 110)]
    bits = [baselines.bits_per_byte(TABLES[:order], texts) for order in (1, 2, 5)]
    assert bits[0] > bits[1] > bits[2] > 0.5


def test_random_bytes_cost_eight_bits_and_more():
    noise = [np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()]
    # Smoothing cannot beat the entropy, and pays for having learned something else.
    assert baselines.bits_per_byte(TABLES, noise) > 7.99 and baselines.lzma_bits_per_byte(noise) > 8


def test_lzma_counts_the_compressed_bytes():
    text = b"abc" * 1000
    assert baselines.lzma_bits_per_byte([text[:900], text[900:]]) == pytest.approx(8 * len(lzma.compress(text)) / 3000, rel=0.1)


def test_results_cover_every_domain_and_are_cached(small, monkeypatch):
    data = build_data(small, VOCAB_SIZE)
    results = baselines.baselines(data)
    assert set(results) == set(data.domains)
    for row in results.values():
        assert set(row) == {"byte_bigram", "byte_5gram", "lzma"} and row["byte_5gram"] < row["byte_bigram"] < 8
    tables = baselines.fit(data.train_texts(), 5)
    for domain, texts in zip(data.domains, data.eval_texts, strict=True):
        assert results[domain]["byte_5gram"] == pytest.approx(baselines.bits_per_byte(tables, texts))
    monkeypatch.setattr(baselines, "_measured", lambda data: pytest.fail("measured twice"))
    assert baselines.baselines(data) == json.loads(json.dumps(results))
