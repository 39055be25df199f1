"""A serving engine's arrays: there and back, and what does not fit."""

import numpy as np
import pytest

from dsv3_jax.tracing.engines import from_engine, to_engine
from dsv3_jax.tracing.store import open_trace
from oracles.traces import CONFIG


def requests(layers, short=0):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 99, n) for n in (5, 3)]
    return tokens, [np.argsort(rng.random((len(t) - short, layers, 16)), axis=-1)[..., :2] for t in tokens]


def set_to(array, place, value):
    array = array.copy()
    array[place] = value
    return array


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
        assert (found[-1] == -1).all()


def test_what_went_out_comes_back_in(tmp_path):
    tokens, experts = requests(2, short=1)
    experts[0][1, 1] = -1
    from_engine(tmp_path / "trace", tokens, experts, CONFIG, domains=["b", "a"])
    trace = open_trace(tmp_path / "trace")
    for rows in ("routers", "all"):
        out = [to_engine(trace, i, rows) for i in range(2)]
        from_engine(tmp_path / rows, tokens, out, CONFIG, domains=["b", "a"])
        again = open_trace(tmp_path / rows)
        for ours, theirs in zip((*again.text, *again.choices[:3]), (*trace.text, *trace.choices[:3]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_minus_one_is_none_and_labels_belong_to_their_requests(tmp_path):
    tokens, experts = requests(3)
    for each in experts:
        each[:, 0] = -1
    experts[1][1, 2] = -1
    from_engine(tmp_path / "trace", tokens, experts, CONFIG, domains=["b", "a"])
    trace = open_trace(tmp_path / "trace")
    assert (trace.choices.experts_NLK[6, 1] == 16).all() and (to_engine(trace, 1)[1, 1] == -1).all()
    assert (trace.choices.experts_NLK[:, :2] == 16).all(axis=-1).sum() == 1
    assert np.isnan(trace.choices.margins_NL).all() and trace.choices.margins_NL.dtype == np.float16
    assert [trace.text.domains[i] for i in trace.text.domain_of] == ["b", "a"]


def test_a_sequence_that_is_not_there_is_one_line(tmp_path):
    from_engine(tmp_path / "trace", *requests(2), CONFIG)
    for sequence in (99, 2, -1):
        with pytest.raises(ValueError, match=rf"sequence: expected 0\.\.1, got {sequence}"):
            to_engine(open_trace(tmp_path / "trace"), sequence)


def test_a_write_that_was_killed_before_its_end_is_finished(tmp_path, monkeypatch):
    tokens, experts = requests(2)
    with monkeypatch.context() as patched:
        patched.setattr("dsv3_jax.tracing.store.Writer.finish", lambda self: None)
        from_engine(tmp_path / "trace", tokens, experts, CONFIG)
    from_engine(tmp_path / "trace", tokens, experts, CONFIG)
    np.testing.assert_array_equal(to_engine(open_trace(tmp_path / "trace"), 1), experts[1])


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
        (lambda t, e: (t, [e[0], set_to(e[1], (0, 0, 0), -2)]), r"request 1: expected -1\.\.15, got -2"),
        (lambda t, e: (t, [set_to(e[0].astype(np.uint64), (0, 0, 0), 2**64 - 1), e[1]]), r"request 0: expected -1\.\.15"),
        (lambda t, e: (t, [e[0], set_to(e[1], (2, 1), [3, 3])]), r"request 1: expected 2 different ones .*, got \[3, 3\]"),
        (lambda t, e: (t, [e[0], set_to(e[1], (2, 1), [3, -1])]), r"request 1: expected 2 different ones .*, got \[3, -1\]"),
        (
            lambda t, e: ([t[0], t[1] + 0.5], e),
            r"tokens of request 1: expected integers \[T\], at least one, got float64 \[3\]",
        ),
        (
            lambda t, e: ([t[0], t[1][None]], e),
            r"tokens of request 1: expected integers \[T\], at least one, got int64 \[1, 3\]",
        ),
        (lambda t, e: ([t[0], np.array(3)], e), r"tokens of request 1: expected integers \[T\], at least one, got int64 \[\]"),
        (lambda t, e: ([t[0][:0], t[1]], [e[0][:0], e[1]]), r"tokens of request 0: expected .*, at least one, got int64"),
        (lambda t, e: ([t[0], set_to(t[1], 0, -1)], e), rf"tokens of request 1: expected 0\.\.{CONFIG.vocab_size - 1}, got -1"),
        (lambda t, e: ([t[0], set_to(t[1], 0, CONFIG.vocab_size)], e), f"tokens of request 1: .*{CONFIG.vocab_size}"),
        (lambda t, e: ([t[0], set_to(t[1], 0, 2**33)], e), f"tokens of request 1: .*{2**33}"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, change, message):
    tokens, experts = change(*requests(2))
    with pytest.raises(ValueError, match=message) as error:
        from_engine(tmp_path / "trace", tokens, experts, CONFIG)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_labels_are_as_many_as_requests(tmp_path):
    with pytest.raises(ValueError, match="domains: expected one for each of 2 requests, got 1"):
        from_engine(tmp_path / "trace", *requests(2), CONFIG, domains=["b"])
    assert not list(tmp_path.iterdir())
