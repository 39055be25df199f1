"""Windows cover the stream of documents: every token is a target once, segments and domains follow the documents."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.packing import ShuffledWindows, TokenDocument, WindowIterator, stack

BOS, PAD = 0, 2


def documents(lengths: list[int]) -> list[TokenDocument]:
    """BOS and then numbers that occur once in the whole stream."""
    ends = np.cumsum(lengths)
    return [
        TokenDocument(np.array([BOS, *range(10 + end - length, 10 + end)], np.int32), i % 3)
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]


lengths = st.lists(st.integers(1, 23), min_size=1, max_size=12)


@settings(max_examples=60)
@given(lengths, st.integers(2, 17))
def test_every_token_after_the_first_is_the_target_of_exactly_one_window(lengths, seq_len):
    docs = documents(lengths)
    stream = np.concatenate([d.tokens for d in docs])
    targets = [w.tokens[1:][w.segment_ids[1:] > 0] for w in WindowIterator(docs, seq_len, PAD)]
    np.testing.assert_array_equal(np.concatenate(targets), stream[1:])


@settings(max_examples=60)
@given(lengths, st.integers(2, 17))
def test_every_input_is_followed_by_its_own_successor(lengths, seq_len):
    windows = list(WindowIterator(documents(lengths), seq_len, PAD))
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.tokens[-1] == after.tokens[0]
    assert all(len(w.tokens) == len(w.segment_ids) == len(w.domain_ids) == seq_len + 1 for w in windows)


@settings(max_examples=60)
@given(lengths, st.integers(2, 17))
def test_segments_count_the_documents_of_a_row_and_domains_follow_them(lengths, seq_len):
    docs = documents(lengths)
    owner = {int(t): i for i, d in enumerate(docs) for t in d.tokens[1:]}
    for window in WindowIterator(docs, seq_len, PAD):
        valid = window.segment_ids > 0
        segments = window.segment_ids[valid]
        assert segments[0] == 1
        # A new document, and nothing else, starts with BOS and a new number.
        np.testing.assert_array_equal(np.diff(segments), (window.tokens[valid][1:] == BOS).astype(np.int32))
        for token, segment, domain in zip(window.tokens[valid], segments, window.domain_ids[valid], strict=True):
            if token != BOS:
                first = owner[int(token)] - int(segment)
                assert docs[owner[int(token)]].domain == domain
                assert all(owner[int(t)] - int(s) == first for t, s in zip(window.tokens[valid], segments, strict=True) if t)


@settings(max_examples=60)
@given(lengths, st.integers(2, 17))
def test_padding_stands_only_at_the_end_of_the_last_window(lengths, seq_len):
    windows = list(WindowIterator(documents(lengths), seq_len, PAD))
    for window in windows[:-1]:
        assert (window.segment_ids > 0).all()
    padding = windows[-1].segment_ids == 0
    assert (np.diff(padding.astype(int)) >= 0).all()
    assert (windows[-1].tokens[padding] == PAD).all() and (windows[-1].domain_ids[padding] == 0).all()
    assert (~padding).sum() >= 2


@settings(max_examples=40)
@given(lengths, st.integers(2, 17), st.data())
def test_a_restored_iterator_goes_on_where_the_saved_one_stood(lengths, seq_len, data):
    whole = list(WindowIterator(documents(lengths), seq_len, PAD))
    cut = data.draw(st.integers(0, len(whole)))
    first = WindowIterator(documents(lengths), seq_len, PAD)
    for _ in range(cut):
        next(first)
    second = WindowIterator(documents(lengths), seq_len, PAD)
    second.set_state(json.loads(json.dumps(first.get_state())))
    rest = list(second)
    assert len(rest) == len(whole) - cut
    for got, expected in zip(rest, whole[cut:], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_rows_beyond_the_windows_are_padding():
    windows = list(WindowIterator(documents([20]), 4, PAD))[:3]
    batch = stack(windows, (2, 2), 4, PAD)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: ((2, 2, 5), np.dtype(np.int32)) for name in ("tokens", "segment_ids", "domain_ids")
    }
    np.testing.assert_array_equal(batch["tokens"][1, 0], windows[2].tokens)
    assert (batch["tokens"][1, 1] == PAD).all() and (batch["segment_ids"][1, 1] == 0).all()


def test_more_windows_than_rows_is_our_own_mistake():
    with pytest.raises(AssertionError):
        stack(list(WindowIterator(documents([20]), 4, PAD))[:3], (1, 2), 4, PAD)


def shuffled(block: int, seed: int = 0) -> ShuffledWindows:
    return ShuffledWindows(WindowIterator(documents([9] * 400), 4, PAD), block, seed)


@given(st.integers(1, 7), st.integers(0, 25))
def test_shuffled_windows_continue_exactly_from_any_state(block, given_out):
    running = shuffled(block)
    for _ in range(given_out):
        next(running)
    restored = shuffled(block)
    restored.set_state(json.loads(json.dumps(running.get_state())))
    for _ in range(2 * block + 3):
        np.testing.assert_array_equal(next(restored).tokens, next(running).tokens)


def test_each_block_is_a_permutation_of_the_windows_in_turn_and_another_in_each_block_and_seed():
    in_turn, mixed = iter(WindowIterator(documents([9] * 400), 4, PAD)), shuffled(16)
    orders = []
    for _ in range(3):
        expected = [tuple(next(in_turn).tokens) for _ in range(16)]
        got = [tuple(next(mixed).tokens) for _ in range(16)]
        assert sorted(got) == sorted(expected) and got != expected
        orders.append([expected.index(window) for window in got])
    assert orders[0] != orders[1] != orders[2]
    assert [tuple(next(shuffled(16, seed)).tokens) for seed in range(4)].count(tuple(next(shuffled(16)).tokens)) < 4
