"""From a configuration to batches [§4.1]: documents shuffled anew each epoch, FIM, packed windows, held-out batches."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Int32

from dsv3_jax.config import DataConfig, TrainConfig
from dsv3_jax.data.fim import fill_in_middle
from dsv3_jax.data.packing import ShuffledWindows, TokenDocument, Window, WindowIterator, stack
from dsv3_jax.data.store import Store, open_store
from dsv3_jax.data.tokenizer import Tokenizer, split_merged

Batch = dict[str, Int32[np.ndarray, "A B S"]]


@dataclass(frozen=True)
class Data:
    """Everything that training and validation read."""

    config: DataConfig
    store: Store

    @property
    def tokenizer(self) -> Tokenizer:
        return self.store.tokenizer

    @property
    def domains(self) -> tuple[str, ...]:
        return self.store.domains

    @property
    def summary(self) -> dict[str, Any]:
        """JSON-able: for each domain documents, bytes, SHA-256, and what training and validation have of them."""
        return self.store.summary

    @cached_property
    def train_documents(self) -> Int[np.ndarray, "documents"]:
        """Numbers of the documents that training sees."""
        return np.flatnonzero(~self.store.held_out)

    def train_batches(
        self, train: TrainConfig, start_state: dict[str, Any] | None = None, rows: Sequence[int] | None = None
    ) -> "TrainBatches":
        """Endless batches of `train.batch_size` sequences; from `start_state` on if given (`TrainBatches.get_state`).

        Row b of each micro-batch of B rows comes from stream b * data_streams // B. With `rows` (ascending) only those rows
        are made, and only their streams' documents read.

        Raises ValueError if the rows do not divide among the streams, or a stream has no document.
        """
        batches = TrainBatches(self._stream, self.config.data_streams, train, rows, self.config.seq_len, self.tokenizer.pad)
        if start_state is not None:
            batches.set_state(start_state)
        return batches

    def _stream(self, number: int) -> ShuffledWindows:
        """Every `data_streams`-th document from number `number` on, in an order of its own."""
        n_streams, seed = self.config.data_streams, self.config.data_seed
        own = self.train_documents[number::n_streams]
        if not len(own):
            raise ValueError(f"data_streams: expected at most {len(self.train_documents)}, a document each, got {n_streams}")
        if n_streams > 1:
            seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        documents = (
            grain.MapDataset.source(own)
            .seed(seed)
            .shuffle()
            .repeat()
            .map_with_index(lambda position, index: self._prepared(int(index), position // len(own)))
        )
        windows = WindowIterator(documents, self.config.seq_len, self.tokenizer.pad)
        return ShuffledWindows(windows, max(1, self.config.shuffle_windows // n_streams), seed)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Held-out batches [1, batch_size, S]; no FIM, no split tokens. The last one is filled up with padding."""
        rows = [window for windows in self._eval_windows for window in windows]
        for start in range(0, len(rows), batch_size):
            yield stack(rows[start : start + batch_size], (1, batch_size), self.config.seq_len, self.tokenizer.pad)

    @cached_property
    def eval_bytes(self) -> Int[np.ndarray, "domains"]:
        """Bytes that the targets of `eval_batches` stand for, by domain.

        Bits per byte is nats / ln 2 / bytes. EOS is a target, counted in the nats, but stands for no byte: predicting where
        a document ends is charged to the model and not to the baselines, which read `eval_texts`.
        """
        return np.array([sum(map(len, texts)) for texts in self.eval_texts])

    @cached_property
    def eval_texts(self) -> list[list[bytes]]:
        """By domain, the documents' bytes that the targets of `eval_batches` stand for; they may be cut short."""
        texts = []
        for windows in self._eval_windows:
            stream = np.concatenate([w.tokens[int(i > 0) :][w.segment_ids[int(i > 0) :] > 0] for i, w in enumerate(windows)])
            starts = np.flatnonzero(stream == self.tokenizer.bos)
            texts.append([self.tokenizer.to_bytes(document) for document in np.split(stream, starts[1:])])
        return texts

    def train_texts(self) -> Iterator[bytes]:
        """The training documents' bytes."""
        return (self.store.text(int(index)) for index in self.train_documents)

    @cached_property
    def _eval_windows(self) -> list[list[Window]]:
        """By domain: as many windows as its share of `eval_sequences`, and at least one.

        They sample many documents rather than a few whole ones: where held-out text is plentiful, a document gives its first
        `seq_len` tokens; where it is scarce, as many as fill the share.
        """
        seq_len, share = self.config.seq_len, max(1, self.config.eval_sequences // len(self.domains))
        windows = []
        for number in range(len(self.domains)):
            members = np.flatnonzero(self.store.held_out & (self.store.domain_of == number))
            longest = max(seq_len, -(-share * seq_len // len(members)))
            mixed = np.random.default_rng(0).permutation(members)
            documents = [self._framed(self.store.document(int(index)), number, longest) for index in mixed]
            iterator = WindowIterator(documents, seq_len, self.tokenizer.pad)
            windows.append(list(itertools.islice(iterator, share)))
        return windows

    def _framed(self, ids: Int[np.ndarray, "T"], domain: int, longest: int | None = None) -> TokenDocument:
        """`BOS ids EOS`, the first `longest` tokens of it if given."""
        tokens = np.concatenate([[self.tokenizer.bos], ids, [self.tokenizer.eos]]).astype(np.int32)
        return TokenDocument(tokens[:longest], domain)

    def _prepared(self, index: int, epoch: int) -> TokenDocument:
        """A training document; what is random about it depends on (seed, epoch, document) and not on who asks when."""
        rng = np.random.default_rng((self.config.data_seed, epoch, index))
        ids = split_merged(self.store.document(index), self.tokenizer.merged, self.config.punctuation_split_rate, rng)
        fim = self.tokenizer.fim
        if fim is not None and rng.random() < self.config.fim_rate:
            ids = fill_in_middle(ids, fim, rng)
        return self._framed(ids, int(self.store.domain_of[index]))


class TrainBatches(Iterator[Batch]):
    """Batches of packed windows; the state is that of the streams read here (small, JSON-able)."""

    def __init__(
        self,
        stream: Callable[[int], ShuffledWindows],
        n_streams: int,
        train: TrainConfig,
        rows: Sequence[int] | None,
        seq_len: int,
        pad: int,
    ):
        self._seq_len, self._pad, self._n_streams = seq_len, pad, n_streams
        self._batch_size, self._n_micro = train.batch_size, train.n_micro_batches
        self._n_rows = train.batch_size // train.n_micro_batches
        if self._n_rows % n_streams:
            name = "batch_size" if train.micro_batch_size is None else "micro_batch_size"
            raise ValueError(f"data_streams: expected a divisor of {name}={self._n_rows}, got {n_streams}; change one of them")
        self._rows = range(self._n_rows) if rows is None else rows
        self._stream_of = [row * n_streams // self._n_rows for row in self._rows]
        self._streams = {number: stream(number) for number in sorted(set(self._stream_of))}

    def __next__(self) -> Batch:
        return self.next_batch(self._batch_size)

    def next_batch(self, n_sequences: int) -> Batch:
        """A batch of the usual shape with `n_sequences` windows in it (batch-size ramp); the rows after them are padding.

        Rows are filled micro-batch by micro-batch, whichever of them are made here.
        """
        if not 0 < n_sequences <= self._batch_size:
            raise ValueError(f"next_batch: expected 1..batch_size={self._batch_size} sequences, got {n_sequences}")
        windows = [
            next(self._streams[number]) if micro * self._n_rows + row < n_sequences else None
            for micro in range(self._n_micro)
            for row, number in zip(self._rows, self._stream_of, strict=True)
        ]
        return stack(windows, (self._n_micro, len(self._rows)), self._seq_len, self._pad)

    def get_state(self) -> dict[str, Any]:
        """The one stream's, or under `streams` one for each: null for those that are not read here."""
        states = [self._streams[n].get_state() if n in self._streams else None for n in range(self._n_streams)]
        return {"streams": states} if self._n_streams > 1 else states[0] or {}

    def set_state(self, state: dict[str, Any]) -> None:
        states = state["streams"] if self._n_streams > 1 else [state]
        for number, stream in self._streams.items():
            stream.set_state(states[number])


def merged_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state with every stream's, of several readers' `get_state` that leave out what they do not read."""
    if "streams" not in states[0]:
        return dict(states[0])
    read = zip(*(state["streams"] for state in states), strict=True)
    return {"streams": [next(state for state in of_one if state is not None) for of_one in read]}


def build_data(data: DataConfig, vocab_size: int) -> Data:
    """Corpus, tokenizer and tokens of this configuration, cached under `cache_dir`.

    Raises ValueError (one line) for a corpus or tokenizer that cannot be used, OSError for a disk that cannot be written.
    """
    opened = Data(data, open_store(data, vocab_size))
    if data.fim_rate > 0 and opened.tokenizer.fim is None:
        raise ValueError(f"fim_rate: tokenizer {data.tokenizer} has no fill-in-the-middle tokens; set fim_rate=0")
    return opened
