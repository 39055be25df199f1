"""No copies across the split, a split by document, and an embedded corpus out of the installation alone."""

import hashlib
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import DataConfig
from dsv3_jax.data import corpus as corpus_module
from dsv3_jax.data import embedded
from dsv3_jax.data.corpus import HOLDOUT_MOST, Corpus, load_corpus, make_corpus, table, without_copies
from dsv3_jax.data.documents import Document, split_long
from oracles.texts import WORDS, invented

LICENCE = " ".join(random.Random(0).choices([f"word{i}" for i in range(400)], k=300))


def kept(*texts: str) -> list[str]:
    return [d.text for d in without_copies(Document("x", text) for text in texts)]


def test_a_copy_with_other_layout_and_another_year_is_dropped():
    first = f"Copyright 2019 Some Body. {LICENCE}"
    second = f"COPYRIGHT (c) 2024 Some Body\n\n{LICENCE.replace(' ', chr(10))}"
    assert kept(first, second) == [first]
    assert kept("a, b; c!", "A B C") == ["a, b; c!"]
    assert kept("since 2019", "since 2024", "since 3024") == ["since 2019", "since 3024"]
    assert kept("...", "!!!", "...") == ["...", "!!!"]


def test_a_text_that_mostly_repeats_an_earlier_one_is_dropped_and_one_that_quotes_it_stays():
    words = LICENCE.split()
    new = " ".join(random.Random(1).choices(WORDS["prose"], k=700))
    assert kept(LICENCE, " ".join(words[:280] + ["other", "ending"])) == [LICENCE]
    assert kept(LICENCE, new + " " + " ".join(words[:100])) == [LICENCE, new + " " + " ".join(words[:100])]


def test_different_documents_all_stay():
    texts = [invented("prose", seed) for seed in range(20)]
    assert kept(*texts) == texts


@settings(max_examples=50)
@given(st.text(max_size=300), st.integers(1, 50))
def test_pieces_join_to_the_text_and_none_is_longer_than_the_limit(text, limit):
    pieces = list(split_long(text, limit))
    assert "".join(pieces) == text and all(len(piece) <= limit for piece in pieces)
    assert all(pieces) or not text


def some_corpus(n: int = 200, size: int = 300) -> Corpus:
    return make_corpus(Document(domain, invented(domain, seed, size)) for domain in WORDS for seed in range(n))


def test_the_held_out_share_is_near_the_fraction_in_every_domain():
    corpus = some_corpus()
    held_out = corpus.held_out(0.3)
    for domain in corpus.domains:
        share = held_out[[d.domain == domain for d in corpus.documents]].mean()
        # Three standard deviations of a binomial share of 200 documents are 0.1.
        assert abs(share - 0.3) < 0.1


def test_the_split_of_a_document_does_not_depend_on_the_others():
    corpus = some_corpus(size=3000)
    rest = make_corpus(d for i, d in enumerate(corpus.documents) if i % 3)
    split = dict(zip(corpus.documents, corpus.held_out(0.3).tolist(), strict=True))
    assert all(split[d] == out for d, out in zip(rest.documents, rest.held_out(0.3).tolist(), strict=True))


def test_a_small_domain_holds_out_more_but_never_all():
    corpus = make_corpus(Document("x", invented("prose", seed)) for seed in range(40))
    assert HOLDOUT_MOST * 40 - 1 <= corpus.held_out(1e-6).sum() <= HOLDOUT_MOST * 40 + 1
    assert make_corpus(corpus.documents[:2]).held_out(0.99).sum() == 1


def test_a_domain_of_one_document_and_an_empty_corpus_are_refused():
    with pytest.raises(ValueError, match="domain 'x' has 1 document"):
        make_corpus([Document("x", "alone"), Document("x", "Alone.")]).held_out(0.1)
    with pytest.raises(ValueError, match="no document"):
        make_corpus([])


def test_the_summary_counts_bytes_and_hashes_them():
    corpus = make_corpus([Document("b", "zwei ✓"), Document("a", "eins"), Document("b", "drei")])
    assert corpus.summary() == {
        "a": {"documents": 1, "bytes": 4, "sha256": hashlib.sha256(b"eins").hexdigest()},
        "b": {"documents": 2, "bytes": 12, "sha256": hashlib.sha256("zwei ✓drei".encode()).hexdigest()},
    }
    assert hashlib.sha256(b"eins").hexdigest() in table(corpus.summary()).splitlines()[1]


def test_docstrings_are_prose_without_doctests():
    source = (
        '"""' + "A module that explains itself at some length. " * 2 + '"""\n'
        "def f():\n    '''" + "Says what it does in many more than a few words, really. " * 2
        + "\n\n    >>> f()\n    3\n\n    And then some more.\n    '''\n    return 3\n"
    )  # fmt: skip
    text = embedded.docstrings(source)
    assert "explains itself" in text and "And then some more." in text and ">>>" not in text and "return" not in text
    assert embedded.docstrings("def (") == ""


def test_leading_comments_are_not_part_of_a_source(tmp_path):
    (tmp_path / "a.py").write_text("# Copyright\n#\n# Licence\n\n'''Doc.'''\n# kept\n")
    (tmp_path / "a.h").write_text("/* Copyright\n * more */\n// and more\n#include <x.h>\n/* kept */\n")
    (python,) = embedded._sources(r"#[^\n]*\n", [tmp_path / "a.py"])
    (header,) = embedded._sources(r"/\*.*?\*/|//[^\n]*\n", [tmp_path / "a.h"])
    assert python == "'''Doc.'''\n# kept\n" and header == "#include <x.h>\n/* kept */\n"


def small_embedded(monkeypatch) -> Corpus:
    monkeypatch.setattr(embedded, "CAPS", dict.fromkeys(embedded.CAPS, 60_000))
    monkeypatch.setattr(embedded, "ARITHMETIC_BYTES", 30_000)
    return load_corpus(DataConfig())


def test_the_embedded_corpus_has_every_domain_and_is_the_same_each_time(monkeypatch):
    first, second = small_embedded(monkeypatch), small_embedded(monkeypatch)
    assert first.summary() == second.summary() and first.domains == embedded.DOMAINS
    for domain, row in first.summary().items():
        assert 20_000 < row["bytes"] < 80_000, domain
    texts = {domain: "".join(d.text for d in first.documents if d.domain == domain) for domain in first.domains}
    for domain, mark in {"python": r"def \w+\(", "c": "#define", "licences": "(?i)permission", "english": r"\bthe\b"}.items():
        assert len(re.findall(mark, texts[domain])) > 10
    assert embedded.fingerprint() == embedded.fingerprint()


@pytest.mark.slow
def test_the_whole_embedded_corpus_has_text_to_train_and_to_evaluate_on_in_every_domain():
    corpus = load_corpus(DataConfig())
    held_out = corpus.held_out(DataConfig().holdout_fraction)
    assert corpus.domains == embedded.DOMAINS
    for number, (domain, row) in enumerate(corpus.summary().items()):
        chosen = np.array([d.domain == domain for d in corpus.documents]) & held_out
        evaluated = sum(len(d.text.encode()) for d, out in zip(corpus.documents, chosen, strict=True) if out)
        assert row["bytes"] > 100_000 and evaluated > 15_000, (number, domain, row, evaluated)


def test_a_sample_of_a_domain_keeps_order_and_stops_at_the_first_document_past_the_limit():
    documents = [Document(domain="ab"[i % 3 == 0], text=f"{i} " + "word " * (i % 7 + 1)) for i in range(60)]
    corpus = Corpus(("a", "b"), documents, 0)
    sample = corpus_module.sampled(corpus, 200)
    assert [d for d in documents if d in sample.documents] == sample.documents
    for domain in "ab":
        sizes = [len(d.text.encode()) for d in sample.documents if d.domain == domain]
        assert 200 <= sum(sizes) < 200 + max(len(d.text.encode()) for d in documents)
    assert corpus_module.sampled(corpus, 10**9).documents == documents
    fewer = corpus_module.sampled(corpus, 100).documents
    assert set(fewer) < set(sample.documents)  # nested: a smaller sample is part of a larger one
