"""The tokenised corpus on disk: built once, read through memory maps, complete or absent."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tqdm import tqdm

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import Corpus, domain_numbers, fingerprint, load_corpus
from dsv3_jax.data.tokenizer import Tokenizer, check_vocab_size, load_tokenizer, train_tokenizer

# The code that decides which tokens a store holds: a change to it makes new stores, and none is mistaken for another.
CODE = ("arithmetic", "corpus", "documents", "embedded", "files", "retrieval", "store", "tokenizer")
ENCODE_BATCH = 256  # documents given to the tokenizer at a time


@dataclass(frozen=True)
class Store:
    """All documents' tokens, one after the other, without BOS and EOS; `bounds[i]` is where document i begins."""

    folder: Path
    tokenizer: Tokenizer
    summary: dict[str, Any]
    tokens: Int[np.ndarray, "N"]
    bounds: Int[np.ndarray, "documents_and_one"]
    domain_of: Int[np.ndarray, "documents"]
    held_out: Bool[np.ndarray, "documents"]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.summary["domains"])

    def document(self, index: int) -> Int[np.ndarray, "T"]:
        """The tokens of one document, a view into the map."""
        return self.tokens[self.bounds[index] : self.bounds[index + 1]]

    def text(self, index: int) -> bytes:
        """The bytes of one document."""
        return self.tokenizer.to_bytes(self.document(index))


def open_store(data: DataConfig, vocab_size: int) -> Store:
    """The store of this configuration, built first if `cache_dir` has none.

    Its key covers the text, the code that reads it, the tokenizer, the vocabulary's size and the share held out. Raises
    ValueError for a corpus or tokenizer that cannot be used, OSError for a disk that is full or not writable.
    """
    cache = Path(data.cache_dir).expanduser()
    key = _key(data, vocab_size)
    folder = cache / f"tokens-{key}"
    if not (folder / "summary.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f"building-{key}-", dir=cache))
        try:
            _build(beside, data, vocab_size, key)
            _rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return _read(folder)


def _key(data: DataConfig, vocab_size: int) -> str:
    tokenizer = data.tokenizer
    if tokenizer != "train":
        path = Path(tokenizer).expanduser()
        if not path.is_file():
            raise ValueError(f"tokenizer: no file {path}; expected `train` or a tokenizer.json")
        tokenizer = hashlib.sha256(path.read_bytes()).hexdigest()
    parts = [code_digest(CODE), tokenizers.__version__, fingerprint(data), tokenizer, vocab_size, data.holdout_fraction]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def code_digest(modules: tuple[str, ...]) -> str:
    """SHA-256 of the sources of modules beside this one."""
    return hashlib.sha256(b"\0".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in modules)).hexdigest()


def _rename(beside: Path, folder: Path) -> None:
    """Of two processes that build the same store, the first one wins and the other one uses its work."""
    try:
        os.rename(beside, folder)
    except OSError:
        if not (folder / "summary.json").exists():
            raise


def _build(folder: Path, data: DataConfig, vocab_size: int, key: str) -> None:
    # What can be wrong with the tokenizer is found before the corpus is read.
    tokenizer = None if data.tokenizer == "train" else load_tokenizer(data.tokenizer, vocab_size)
    if tokenizer is None:
        check_vocab_size(vocab_size)
    with tqdm(desc="reading the corpus", unit="doc", leave=False, disable=None) as bar:
        corpus = load_corpus(data)
        held_out = corpus.held_out(data.holdout_fraction)
        bar.reset(total=len(corpus.documents))
        if tokenizer is None:
            bar.set_description("training the tokenizer")
            training = (d.text for d, out in zip(corpus.documents, held_out, strict=True) if not out)
            tokenizer = train_tokenizer(training, vocab_size)
        bar.set_description("tokenising")
        documents: list[Int[np.ndarray, T]] = []
        for start in range(0, len(corpus.documents), ENCODE_BATCH):
            documents += _encode([d.text for d in corpus.documents[start : start + ENCODE_BATCH]], tokenizer)
            bar.update(len(documents) - bar.n)
    bounds = np.cumsum([0, *map(len, documents)])
    domain_of = np.array(domain_numbers(corpus))
    np.save(folder / "tokens.npy", np.concatenate(documents).astype(np.int32))
    np.save(folder / "bounds.npy", bounds)
    np.save(folder / "domain_of.npy", domain_of)
    np.save(folder / "held_out.npy", held_out)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    summary = _summary(corpus, domain_of, held_out, np.diff(bounds))
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    about = {"key": key, "vocabulary": tokenizer.size, "tokenizer": digest, **summary}
    (folder / "summary.json").write_text(json.dumps(about, indent=1))


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, "T"]]:
    """Each text's ids. Raises ValueError if a tokenizer does not keep the bytes of a text."""
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        document = np.array(ids, np.int64)
        if tokenizer.n_bytes[document].sum() != len(text.encode()):
            raise ValueError(f"tokenizer: it loses bytes of {text[:30]!r}...; a byte-level tokenizer is expected")
        yield document


def _summary(
    corpus: Corpus, domain_of: Int[np.ndarray, "documents"], held_out: Bool[np.ndarray, "documents"],
    n_tokens: Int[np.ndarray, "documents"],
) -> dict[str, Any]:  # fmt: skip
    n_bytes = np.array([len(document.text.encode()) for document in corpus.documents])
    rows: dict[str, dict[str, Any]] = {name: dict(row) for name, row in corpus.summary().items()}
    for number, row in enumerate(rows.values()):
        for part, chosen in (("train", ~held_out), ("held_out", held_out)):
            members = chosen & (domain_of == number)
            row[f"{part}_documents"] = int(members.sum())
            row[f"{part}_bytes"] = int(n_bytes[members].sum())
            row[f"{part}_tokens"] = int(n_tokens[members].sum())
    return {"copies_dropped": corpus.duplicates, "domains": rows}


def _read(folder: Path) -> Store:
    summary = json.loads((folder / "summary.json").read_text())
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
    tokens, bounds, domain_of, held_out = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "bounds", "domain_of", "held_out")
    )
    return Store(folder, tokenizer, summary, tokens, bounds, domain_of, held_out)
