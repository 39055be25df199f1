"""From a configuration to batches [§4.1]: documents shuffled anew each epoch, FIM, packed windows, held-out batches."""

import itertools
from collections.abc import Iterator
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

    def train_batches(self, train: TrainConfig, start_state: dict[str, Any] | None = None) -> "TrainBatches":
        """Endless batches of `train.batch_size` sequences; from `start_state` on if given (`TrainBatches.get_state`)."""
        documents = (
            grain.MapDataset.source(self.train_documents)
            .seed(self.config.data_seed)
            .shuffle()
            .repeat()
            .map_with_index(lambda position, index: self._prepared(int(index), position // len(self.train_documents)))
        )
        stream = WindowIterator(documents, self.config.seq_len, self.tokenizer.pad)
        windows = ShuffledWindows(stream, self.config.shuffle_windows, self.config.data_seed)
        batches = TrainBatches(windows, train, self.config.seq_len, self.tokenizer.pad)
        if start_state is not None:
            batches.set_state(start_state)
        return batches

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
    """Batches of packed windows; the state is the windows' (small, JSON-able)."""

    def __init__(self, windows: ShuffledWindows, train: TrainConfig, seq_len: int, pad: int):
        self._windows, self._seq_len, self._pad = windows, seq_len, pad
        self._batch_size = train.batch_size
        self._shape = (train.n_micro_batches, train.batch_size // train.n_micro_batches)

    def __next__(self) -> Batch:
        return self.next_batch(self._batch_size)

    def next_batch(self, n_sequences: int) -> Batch:
        """A batch of the usual shape with `n_sequences` windows in it (batch-size ramp); the rows after them are padding."""
        if not 0 < n_sequences <= self._batch_size:
            raise ValueError(f"next_batch: expected 1..batch_size={self._batch_size} sequences, got {n_sequences}")
        windows = [next(self._windows) for _ in range(n_sequences)]
        return stack(windows, self._shape, self._seq_len, self._pad)

    def get_state(self) -> dict[str, Any]:
        return self._windows.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._windows.set_state(state)


def build_data(data: DataConfig, vocab_size: int) -> Data:
    """Corpus, tokenizer and tokens of this configuration, cached under `cache_dir`.

    Raises ValueError (one line) for a corpus or tokenizer that cannot be used, OSError for a disk that cannot be written.
    """
    opened = Data(data, open_store(data, vocab_size))
    if data.fim_rate > 0 and opened.tokenizer.fim is None:
        raise ValueError(f"fim_rate: tokenizer {data.tokenizer} has no fill-in-the-middle tokens; set fim_rate=0")
    return opened
