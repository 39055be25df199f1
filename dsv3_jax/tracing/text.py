"""The text of a trace: held-out documents of the embedded corpus, the user's files, or tokens as they are, in windows."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data import files
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.documents import Document
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.score import mapped_array
from dsv3_jax.inference.text import prompt_ids
from dsv3_jax.tracing.store import Text


def read_text(data: DataConfig, tokenizer: Tokenizer | None, most_tokens: int | None) -> Text:
    """`data.corpus`: `embedded`, globs of .txt, .jsonl or .parquet, or one .npy of tokens [sequences, T]; in windows of
    `data.seq_len` tokens, of at most `most_tokens` in all.

    Each document begins with BOS. Raises ValueError for files that cannot be read and for text without a tokenizer.
    """
    if data.corpus.endswith(".npy"):
        return _of_array(Path(data.corpus), data.seq_len, most_tokens)
    if tokenizer is None:
        raise ValueError("--data: this checkpoint has no tokenizer.json; give tokens, an .npy file of integers [sequences, T]")
    return _windows(_encoded(documents_of(data), tokenizer), data.seq_len, most_tokens)


def documents_of(data: DataConfig) -> Iterable[Document]:
    """`embedded`: the held-out documents of the corpus; else all of the files. Raises ValueError for what cannot be read."""
    if data.corpus != "embedded":
        return files.documents(data)
    corpus = load_corpus(data)
    return [d for d, out in zip(corpus.documents, corpus.held_out(data.holdout_fraction), strict=True) if out]


def _encoded(texts: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    for document in texts:
        yield document.domain, np.asarray(prompt_ids(tokenizer, document.text), np.int32)


def _windows(documents: Iterable[tuple[str, np.ndarray]], size: int, most: int | None) -> Text:
    tokens, lengths, document_of, domain_of, numbers = [], [], [], [], dict[str, int]()
    left = most
    for number, (domain, ids) in enumerate(documents):
        ids = ids if left is None else ids[:left]
        if not len(ids):
            break
        left = None if left is None else left - len(ids)
        for start in range(0, len(ids), size):
            lengths.append(len(ids[start : start + size]))
            document_of.append(number)
            domain_of.append(numbers.setdefault(domain, len(numbers)))
        tokens.append(ids)
    if not tokens:
        raise ValueError("--data: expected at least one token, got none")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Text(np.concatenate(tokens), starts, np.asarray(document_of), np.asarray(domain_of), tuple(numbers))


def _of_array(path: Path, size: int, most: int | None) -> Text:
    rows = mapped_array(path, "--data")
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise ValueError(f"--data: {path}: expected integers [sequences, T], got {rows.dtype} {list(rows.shape)}")
    return _windows((("tokens", _int32(row, path)) for row in rows), size, most)


def _int32(ids: np.ndarray, path: Path) -> np.ndarray:
    largest = np.iinfo(np.int32).max
    if ids.size and not 0 <= ids.min() <= ids.max() <= largest:  # it would wrap, and be another token
        raise ValueError(f"--data: {path}: expected token ids 0..{largest}, got {ids.min()}..{ids.max()}")
    return np.asarray(ids, np.int32)


def data_of(corpus: str, seq_len: int, domain_from: str = "path", text_field: str = "text") -> DataConfig:
    return replace(DataConfig(), corpus=corpus, seq_len=seq_len, domain_from=domain_from, text_field=text_field)
