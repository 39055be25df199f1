"""The text of a trace: windows of documents in order, tokens as they are, and what cannot be read."""

import json

import numpy as np
import pytest

from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.tracing.text import data_of, read_text

TOKENIZER = train_tokenizer(["the cat sat on the mat, the dog did not"] * 3, 300)


def test_documents_are_cut_into_windows_that_begin_with_bos(tmp_path):
    rows = [("the cat sat " * 8, "a"), ("the dog", "b"), ("the mat " * 3, "a")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text, "kind": kind}) + "\n" for text, kind in rows))
    text = read_text(data_of(str(tmp_path / "*.jsonl"), 10, "kind", "body"), TOKENIZER, None)
    assert text.domains == ("a", "b") and (text.lengths <= 10).all()
    whole = [np.concatenate([text.tokens_N[text.sequence(i)] for i in np.flatnonzero(text.document_of == d)]) for d in range(3)]
    for ids, (body, _) in zip(whole, rows, strict=True):
        assert ids[0] == TOKENIZER.bos and TOKENIZER.to_bytes(ids[1:]).decode() == body
    by_document = [set(text.domain_of[text.document_of == d].tolist()) for d in range(3)]
    assert by_document == [{0}, {1}, {0}]
    less = read_text(data_of(str(tmp_path / "*.jsonl"), 10, "kind", "body"), TOKENIZER, 15)
    np.testing.assert_array_equal(less.tokens_N, text.tokens_N[:15])
    assert less.starts.tolist() == [0, 10, 15]


def test_domains_are_numbered_as_they_appear(tmp_path):
    rows = [("one", "a"), ("two", "a"), ("three", "b")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text, "kind": kind}) + "\n" for text, kind in rows))
    text = read_text(data_of(str(tmp_path / "*.jsonl"), 99, "kind"), TOKENIZER, None)
    assert text.domains == ("a", "b") and text.domain_of.tolist() == [0, 0, 1] and text.document_of.tolist() == [0, 1, 2]


def test_tokens_need_no_tokenizer(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(24).reshape(2, 12))
    text = read_text(data_of(str(tmp_path / "t.npy"), 8), None, None)
    assert text.starts.tolist() == [0, 8, 12, 20, 24] and text.document_of.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(text.tokens_N, np.arange(24))


@pytest.mark.slow  # copies are looked for in all of it
def test_the_embedded_corpus_gives_held_out_documents_of_all_domains():
    text = read_text(data_of("embedded", 512), TOKENIZER, None)
    assert len(text.domains) > 3 and len(text.tokens_N) > 10_000


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t.npy", np.zeros((2, 3)), r"expected integers \[sequences, T\], got float64 \[2, 3\]"),
        ("t.npy", np.zeros(3, int), r"got int64 \[3\]"),
        ("t.npy", np.zeros((0, 3), int), "expected at least one token, got none"),
        ("t.npy", np.array([[1, 2**33]]), rf"t\.npy: expected token ids 0\.\.{2**31 - 1}, got 1\.\.{2**33}"),
        ("t.npy", np.array([[1, 2**64 - 1]], np.uint64), rf"expected token ids 0\.\.{2**31 - 1}, got 1\.\.{2**64 - 1}"),
        ("t.npy", np.array([[1, -1]]), r"expected token ids 0\.\.\d+, got -1\.\.1"),
        ("none.npy", np.zeros((2, 3), int), "--data: no file"),
        ("*.txt", np.zeros((2, 3), int), "no file matches"),
    ],
)
def test_wrong_data_is_one_line(tmp_path, name, array, message):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(ValueError, match=message) as error:
        read_text(data_of(str(tmp_path / name), 8), TOKENIZER, None)
    assert "\n" not in str(error.value)


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json; give tokens"):
        read_text(data_of("embedded", 8), None, None)
    (tmp_path / "t.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"t\.npy is no \.npy file"):
        read_text(data_of(str(tmp_path / "t.npy"), 8), None, None)
