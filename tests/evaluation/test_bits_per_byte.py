"""Bits per byte: every token once, with the context that the rule promises, over all bytes of the text."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data.documents import Document
from dsv3_jax.evaluation import bits_per_byte
from dsv3_jax.evaluation.bits_per_byte import check_overlap, run_documents, windows
from dsv3_jax.evaluation.journal import Journal
from oracles.talkative import ANSWER, byte_tokenizer, reference_logprobs

TOKENIZER = byte_tokenizer()
DOCUMENTS = [
    Document("one", "a" + ANSWER),
    Document("two", "né" * 7 + "z"),
    Document("one", "short"),
    Document("two", "x" * 40),
]


@given(st.integers(1, 200), st.integers(2, 40), st.data())
def test_every_token_is_predicted_once_with_its_overlap(n, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    ids, predicted = list(range(n + 1)), []
    for request in windows(ids, window, overlap):
        n_read = len(request.tokens) - 1
        assert 1 <= n_read <= window and n_read == min(window, request.tokens[-1])  # as much as there is
        assert list(request.tokens) == list(range(request.tokens[0], request.tokens[-1] + 1))
        new = request.tokens[-request.n_scored :]
        assert predicted == [] or new[0] - request.tokens[0] >= overlap + 1  # itself predicted from that many and one more
        predicted += new
    assert predicted == ids[1:]


def test_bits_are_those_of_numpy_window_by_window(subject, tmp_path):
    window, overlap = 16, 5
    with Journal(tmp_path, "bits") as journal:
        found = run_documents(
            subject.supply, subject.tokenizer, DOCUMENTS, journal, window=window, overlap=overlap, batch_tokens=64, seed=0
        )
    for number, document in enumerate(DOCUMENTS):
        ids, nats = [TOKENIZER.bos, *TOKENIZER.encode(document.text)], 0.0
        for target in range(1, len(ids)):
            # by the rule: the first window's end, then every `window - overlap` tokens
            end = window if target <= window else window + -(-(target - window) // (window - overlap)) * (window - overlap)
            end = min(end, len(ids) - 1)
            start = max(0, end - window)
            nats -= reference_logprobs(ids[start:target])[-1, ids[target]]
        own = journal.finished[number]
        assert own["tokens"] == len(ids) - 1 and own["bytes"] == len(document.text.encode())
        assert own["bits"] == pytest.approx(nats / math.log(2), rel=1e-4)
    bits, n_bytes = (np.array([journal.finished[i][name] for i in range(4)]) for name in ("bits", "bytes"))
    assert found["all"]["bits_per_byte"]["value"] == pytest.approx(bits.sum() / n_bytes.sum())
    one = found["domains"]["one"]
    assert one["bits_per_byte"]["value"] == pytest.approx((bits[0] + bits[2]) / (n_bytes[0] + n_bytes[2]))
    assert one["documents"] == 2 and one["bytes"] == n_bytes[0] + n_bytes[2]
    assert one["bits_per_byte"]["low"] <= one["bits_per_byte"]["value"] <= one["bits_per_byte"]["high"]


def test_finished_documents_are_not_computed_again(subject, tmp_path, monkeypatch):
    def run(heard):
        with Journal(tmp_path, "bits") as journal:
            return run_documents(
                subject.supply, subject.tokenizer, DOCUMENTS, journal, window=16, overlap=5, batch_tokens=64, seed=0,
                on_records=heard.append,
            )  # fmt: skip

    whole = run([])
    lines = (tmp_path / "bits.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "bits.jsonl").write_text("".join(lines[:2]))
    assert run(heard := []) == whole and sum(heard) == 2
    monkeypatch.setattr(bits_per_byte, "_outcome", None)
    assert run(heard := []) == whole and sum(heard) == 0


def test_an_overlap_of_the_whole_window_is_refused():
    check_overlap(8, 7)
    for overlap in (8, -1):
        with pytest.raises(ValueError, match=r"--overlap: expected 0\.\.7"):
            check_overlap(8, overlap)
