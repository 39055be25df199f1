"""The text and the traces that notebooks show where they are given none."""

from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.presets import preset
from dsv3_jax.tracing import diff, example

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_text_is_windows_of_three_domains_that_its_tokenizer_made():
    text, tokenizer = example.short_text(512, documents=4)
    assert text.domains == ("arithmetic", "english", "python") and (text.lengths == example.WINDOW).all()
    assert len(text.tokens_N) == len(text.document_of) * example.WINDOW == len(text.domain_of) * example.WINDOW
    assert 0 <= text.tokens_N.min() and text.tokens_N.max() < 512
    for domain in range(3):
        documents = text.document_of[text.domain_of == domain]
        assert 1 <= len(set(documents.tolist())) <= 4
    written = tokenizer.decode(text.tokens_N[text.sequence(int(np.flatnonzero(text.domain_of == 0)[0]))].tolist())
    assert any(c.isdigit() for c in written)


def test_traces_of_formats_are_of_the_same_weights_and_text():
    tiny = replace(preset("tiny").model, num_hidden_layers=2, num_nextn_predict_layers=0)
    bf16 = replace(tiny, compute_dtype="bfloat16", param_dtype="bfloat16")
    traces, _ = example.random_traces({"a": tiny, "b": bf16, "c": tiny}, 2, scores=True)
    found = diff.compare(traces["a"], traces["b"])
    assert 0 < found["flipped"] < 0.2 and found["same_model"]
    assert diff.compare(traces["a"], traces["c"])["flipped"] == 0
    assert traces["b"].about.how == {"dtype": "bfloat16", "fp8": False}
    experts, scores = (getattr(traces["a"].choices, name) for name in ("experts_NLK", "scores_NLE"))
    assert scores.shape == (traces["a"].n_tokens, 1, 16)
    # The first expert has the largest score of its groups, and the bias is 0: none but one of a group left out may be larger.
    assert (np.take_along_axis(scores, experts.astype(int), axis=-1)[..., 0] >= np.sort(scores, axis=-1)[..., 8]).all()
