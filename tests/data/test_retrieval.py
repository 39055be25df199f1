"""Retrieval documents: every question's answer stands before it, at any distance; haystacks hold one needle where they say."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config import DataConfig
from dsv3_jax.data import corpus
from dsv3_jax.data.documents import Document
from dsv3_jax.data.retrieval import FILLER, KEYS, SHORTEST, VALUES, haystack, retrieval_documents
from dsv3_jax.data.tokenizer import train_tokenizer

LINE = re.compile(r"([a-z])( ?)([a-z])")  # a fact, or with a space a question
BEGIN = 0


def encode(text: str) -> list[int]:
    """A token a character: an exact measure, and a text that can be read back."""
    return [ord(character) for character in text]


def read(text: str) -> list[tuple[str, str, str]]:
    """(kind, key, value) of every line, read apart from the code that wrote them."""
    matches = [LINE.fullmatch(line) for line in text.splitlines()]
    return [("question" if m[2] else "fact", m[1], m[3]) if m else ("filler", "", "") for m in matches]


def test_every_questions_value_is_the_one_of_the_only_fact_of_its_key_before_it():
    kinds = dict.fromkeys(("filler", "fact", "question"), 0)
    for text in retrieval_documents(60_000, context=256):
        known: dict[str, str] = {}
        for kind, key, value in read(text):
            kinds[kind] += 1
            if kind == "fact":
                assert key in KEYS and value in VALUES and key not in known
                known[key] = value
            elif kind == "question":
                assert known[key] == value
        assert known and {line for line in text.splitlines() if not LINE.fullmatch(line)} <= set(FILLER)
    assert min(kinds.values()) > 0.1 * sum(kinds.values()), kinds


@pytest.mark.parametrize("context", [256, 4096])
def test_facts_and_the_distances_to_their_questions_reach_over_the_whole_document(context):
    places, distances, ranks = [], [], []
    for text in retrieval_documents(400_000, context):
        lines, first = read(text), {}
        for i, (kind, key, _) in enumerate(lines):
            if kind == "fact":
                first[key] = i
                places.append(i / len(lines))
            elif kind == "question":
                distances.append((i - first[key]) / len(lines))
                if len(first) >= 4:  # of the facts so far, from the oldest
                    ranks.append((list(first).index(key) + 0.5) / len(first))
    for shares, least in ((places, 0.04), (distances, 0.04), (ranks, 0.15)):
        quarters = np.histogram(shares, bins=[0, 0.25, 0.5, 0.75, 1])[0] / len(shares)
        assert quarters.min() > least and len(shares) > 250, quarters


def test_a_trained_tokenizer_makes_one_token_of_every_fact_key_and_value():
    tokenizer = train_tokenizer(retrieval_documents(400_000, 256), 768)
    for key in KEYS:
        assert len(tokenizer.encode(key)) == 1
        for value in VALUES:
            assert len(tokenizer.encode(key + value)) == 1 and len(tokenizer.encode(f" {value}")) == 1
            apart = [tokenizer.encode(part) for part in (key, f" {value}", "\n")]
            assert tokenizer.encode(f"{key} {value}\n") == sum(apart, [])


@pytest.mark.parametrize("context", [256, 1024, 4096])
def test_documents_are_as_long_as_the_context_asks_repeat_and_differ_by_seed(context):
    documents = list(retrieval_documents(20 * context, context))
    tokens = [len(re.findall(r"[a-z]+|\n", text)) for text in documents]
    assert 0.7 * context < max(tokens) < context + 12 and context / SHORTEST <= min(tokens) < 2 * context / SHORTEST
    assert documents == list(retrieval_documents(20 * context, context))
    assert documents != list(retrieval_documents(20 * context, context, seed=1))
    fewer = list(retrieval_documents(5 * context, context))
    assert documents[: len(fewer)] == fewer


@given(st.integers(20, 2000), st.floats(0, 1), st.integers(0, 1000))
def test_a_haystack_holds_its_needle_once_at_its_depth_and_asks_for_it_last(length, depth, seed):
    hay = haystack(length, depth, encode, seed, begin=BEGIN)
    assert hay == haystack(length, depth, encode, seed, begin=BEGIN)
    assert length - 40 < len(hay.prompt) + len(hay.answer) <= length and hay.prompt[0] == BEGIN
    text, answer = ("".join(map(chr, tokens)) for tokens in (hay.prompt[1:], hay.answer))
    *lines, key = text.split("\n")
    fact = key + answer.removeprefix(" ")
    assert key in KEYS and answer in {f" {value}" for value in VALUES}
    assert [line for line in lines if LINE.fullmatch(line) and line[0] == key] == [fact]
    assert text[hay.needle - 1 :].startswith(f"{fact}\n")
    assert lines.index(fact) == round(depth * (len(lines) - 1))
    facts = [line for line in lines if LINE.fullmatch(line)]
    assert len({line[0] for line in facts}) == len(facts) and set(lines) - set(facts) <= set(FILLER)
    assert len(facts) == len(KEYS) or length < 150  # all keys, where they are at most half of it


def test_a_length_without_room_for_needle_and_question_is_refused_in_one_line():
    with pytest.raises(ValueError, match="length: expected at least 7 tokens for a needle and its question, got 6"):
        haystack(6, 0.5, encode, 0, begin=BEGIN)
    assert len(haystack(7, 0.5, encode, 0, begin=BEGIN).prompt) == 5


def test_the_domain_is_last_and_absent_by_default(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.txt").write_text(f"text {name} {i}")
    settings = dict(corpus=f"{tmp_path}/*/*.txt", seq_len=64)
    plain = corpus.load_corpus(DataConfig(**settings))
    assert plain.domains == ("a", "b")
    more = corpus.load_corpus(DataConfig(**settings, retrieval_bytes=5000, domain_bytes=1))
    assert more.domains == ("a", "b", "retrieval")
    texts = [document.text for document in more.documents if document.domain == "retrieval"]
    assert texts == list(retrieval_documents(5000, 64)), "a cap on the corpus does not cut them"
    longer = corpus.load_corpus(DataConfig(**settings, retrieval_bytes=5000, retrieval_context=128))
    assert longer.documents[4:] == [Document("retrieval", text) for text in retrieval_documents(5000, 128)]


def test_the_stores_key_changes_with_the_documents_and_only_with_them(tmp_path):
    (tmp_path / "a.txt").write_text("text")

    def key(**settings):
        return corpus.fingerprint(DataConfig(corpus=f"{tmp_path}/*.txt", **settings))

    assert key(seq_len=64) == key(seq_len=128) == key(retrieval_context=5)
    keys = [key(), *(key(retrieval_bytes=n, seq_len=s) for n in (10, 20) for s in (64, 128))]
    assert len(set(keys)) == 5
    assert key(retrieval_bytes=10, seq_len=64) == key(retrieval_bytes=10, seq_len=128, retrieval_context=64)


def test_a_corpus_with_a_domain_of_that_name_is_refused(tmp_path):
    (tmp_path / "retrieval").mkdir()
    (tmp_path / "retrieval" / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="retrieval_bytes: the corpus has a domain 'retrieval' already"):
        corpus.load_corpus(DataConfig(corpus=f"{tmp_path}/*/*.txt", retrieval_bytes=100))
