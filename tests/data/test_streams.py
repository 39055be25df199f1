"""Streams: what a row is depends on their number alone, and who makes some rows reads only those rows' documents."""

import json
from dataclasses import replace

import grain
import numpy as np
import pytest

from dsv3_jax.config import DataConfig, TrainConfig
from dsv3_jax.data import Data, build_data
from dsv3_jax.data.packing import ShuffledWindows, WindowIterator
from dsv3_jax.data.pipeline import merged_states
from dsv3_jax.data.store import Store
from oracles.texts import VOCAB_SIZE

TRAIN = TrainConfig(steps=1, batch_size=8, batch_size_start=8, micro_batch_size=4)


@pytest.fixture(scope="module")
def data(small) -> Data:
    return build_data(small, VOCAB_SIZE)


def streamed(data: Data, n_streams: int, **changes) -> Data:
    return Data(replace(data.config, data_streams=n_streams, **changes), data.store)


def several(batches, sizes=(8, 8, 5, 1, 8)) -> list:
    return [batches.next_batch(n) for n in sizes]


def assert_same(got: list, expected: list) -> None:
    for a, b in zip(got, expected, strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("n_streams", [1, 2, 4])
def test_rows_made_apart_are_the_rows_made_together(data, n_streams):
    divided = streamed(data, n_streams)
    together = several(divided.train_batches(TRAIN))
    size = 4 // n_streams
    for number in range(n_streams):
        rows = range(number * size, number * size + size)
        apart = several(divided.train_batches(TRAIN, rows=rows))
        assert_same(apart, [{name: a[:, list(rows)] for name, a in batch.items()} for batch in together])


def test_one_stream_is_what_there_was_before_there_were_several(data):
    # As it was written then: all documents shuffled with the data's seed, packed, shuffled in blocks, taken row by row.
    config, documents = data.config, data.train_documents
    shuffled = grain.MapDataset.source(documents).seed(config.data_seed).shuffle().repeat()
    prepared = shuffled.map_with_index(lambda position, index: data._prepared(int(index), position // len(documents)))
    packed = WindowIterator(prepared, config.seq_len, data.tokenizer.pad)
    windows = ShuffledWindows(packed, config.shuffle_windows, config.data_seed)
    sizes = (8, 3, 5)
    for size, batch in zip(sizes, several(data.train_batches(TRAIN), sizes), strict=True):
        expected = [next(windows).tokens for _ in range(size)]
        np.testing.assert_array_equal(batch["tokens"].reshape(8, -1)[:size], expected)


def test_a_reader_of_some_rows_reads_no_other_streams_documents(data, monkeypatch):
    read: list[int] = []
    plain = Store.document
    monkeypatch.setattr(Store, "document", lambda self, index: read.append(int(index)) or plain(self, index))
    divided, seen = streamed(data, 2, shuffle_windows=8), []
    for rows in (range(2), range(2, 4)):
        read.clear()
        batches = divided.train_batches(TRAIN, rows=rows)
        for _ in range(60):
            next(batches)
        seen.append(set(read))
    numbers = divided.train_documents
    assert seen == [set(numbers[0::2].tolist()), set(numbers[1::2].tolist())], "an epoch of its own documents, and no other"


def test_the_state_of_every_stream_is_resumed_together_or_apart(data):
    divided = streamed(data, 2)
    running = divided.train_batches(TRAIN)
    parts = [divided.train_batches(TRAIN, rows=rows) for rows in (range(2), range(2, 4))]
    for batches in (running, *parts):
        several(batches)
    states = [json.loads(json.dumps(part.get_state())) for part in parts]
    assert states[0]["streams"][1] is None and states[1]["streams"][0] is None
    assert merged_states(states) == running.get_state()
    expected = several(running)
    assert_same(several(divided.train_batches(TRAIN, merged_states(states))), expected)
    resumed = divided.train_batches(TRAIN, merged_states(states), rows=range(2, 4))
    assert_same(several(resumed), [{name: a[:, 2:] for name, a in batch.items()} for batch in expected])


def test_a_state_from_before_there_were_streams_is_resumed(data):
    running = data.train_batches(TRAIN)
    several(running)
    state = running.get_state()
    assert set(state) == {"origin", "block", "given"}
    assert_same(several(data.train_batches(TRAIN, merged_states([state, state]))), several(running))


def test_streams_have_orders_of_their_own(data):
    plain = streamed(data, 4, fim_rate=0.0, punctuation_split_rate=0.0)
    first = [next(plain._stream(number)).tokens.tolist() for number in range(4)]
    assert len({tuple(tokens) for tokens in first}) == 4
    again = [next(plain._stream(number)).tokens.tolist() for number in range(4)]
    assert first == again


def test_what_does_not_divide_is_refused_in_one_line(data):
    with pytest.raises(ValueError, match="data_streams: expected a divisor of micro_batch_size=4, got 3"):
        streamed(data, 3).train_batches(TRAIN)
    with pytest.raises(ValueError, match=r"data_streams: expected at most \d+, a document each, got 128"):
        many = TrainConfig(steps=1, batch_size=128, batch_size_start=128)
        streamed(data, 128).train_batches(many)
    with pytest.raises(ValueError, match="data_streams: expected at most shuffle_windows=4, got 8"):
        DataConfig(shuffle_windows=4, data_streams=8)
