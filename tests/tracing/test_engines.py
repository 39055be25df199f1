"""A serving engine's arrays: there and back, and what does not fit."""

import numpy as np
import pytest

from dsv3_jax.tracing.engines import from_engine, to_engine
from dsv3_jax.tracing.store import open_trace
from oracles.traces import CONFIG


def requests(layers, short=0):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 99, n) for n in (5, 3)]
    return tokens, [rng.integers(0, 16, (len(t) - short, layers, 2)) for t in tokens]


def test_there_and_back(tmp_path):
    tokens, experts = requests(2)
    from_engine(tmp_path / "trace", tokens, experts, CONFIG, domains=["a", "b"])
    trace = open_trace(tmp_path / "trace")
    assert trace.about.layers == ("1", "2", "mtp 1") and trace.text.domains == ("a", "b")
    for i in range(2):
        np.testing.assert_array_equal(trace.text.tokens_N[trace.text.sequence(i)], tokens[i])
        np.testing.assert_array_equal(to_engine(trace, i), experts[i])
        every = to_engine(trace, i, "all")
        assert every.shape == (len(tokens[i]), 3, 2) and (every[:, 0] == -1).all()
        np.testing.assert_array_equal(every[:, 1:], experts[i])
    assert (trace.choices.experts_NLK[:, 2] == 16).all() and np.isnan(trace.choices.gates_NLK).all()


def test_rows_of_dense_layers_and_a_last_token_that_was_not_run(tmp_path):
    tokens, experts = requests(3, short=1)
    from_engine(tmp_path / "trace", tokens, experts, CONFIG)
    trace = open_trace(tmp_path / "trace")
    for i in range(2):
        found = to_engine(trace, i)
        np.testing.assert_array_equal(found[:-1], experts[i][:, 1:])
        assert (found[-1] == 16).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, e: (t, e[:1]), "expected an array for each of 2 requests"),
        (
            lambda t, e: (t, [e[0], e[1][:1]]),
            r"request 1: expected integers \[3 or 2 tokens, 2 or 3 layers, 2\], got int64 \[1, 2, 2\]",
        ),
        (lambda t, e: (t, [e[0][..., :1], e[1]]), "request 0: expected integers"),
        (lambda t, e: (t, [e[0] + 0.5, e[1]]), "got float64"),
        (lambda t, e: (t, [e[0] + 16, e[1]]), r"request 0: expected -1\.\.15"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, change, message):
    tokens, experts = change(*requests(2))
    with pytest.raises(ValueError, match=message):
        from_engine(tmp_path / "trace", tokens, experts, CONFIG)
