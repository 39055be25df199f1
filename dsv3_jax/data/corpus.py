"""Corpus: labelled documents without copies, split by document [§4.1].

A corpus is an ordered list of documents, each in one domain. A document of which another one holds a copy (equal up to
white space, punctuation, years and letter case) or most of the text is dropped, so that held-out text is no copy of
training text.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from dsv3_jax.config import DataConfig
from dsv3_jax.data import embedded, files
from dsv3_jax.data.documents import Document
from dsv3_jax.data.retrieval import retrieval_documents

SHINGLE_WORDS = 8  # a phrase of so many words is hardly ever repeated by chance
SHINGLE_SAMPLE = 4  # one phrase in so many is remembered
COPIED_SHARE = 0.5  # a document is a near copy when more than this share of its phrases was seen before
HOLDOUT_BYTES = 20_000  # less would make a noisy bits-per-byte
HOLDOUT_MOST = 0.2
RETRIEVAL = "retrieval"  # the domain of generated retrieval documents
# Keeps each use of the hash apart from the others.
HOLDOUT_PERSON, SAMPLE_PERSON = b"dsv3-holdout", b"dsv3-sample"


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order; `domains` in the order of their numbers."""

    domains: tuple[str, ...]
    documents: list[Document]
    duplicates: int  # documents that were dropped as copies

    def summary(self) -> dict[str, dict[str, int | str]]:
        """Domain -> number of documents, bytes of UTF-8 text, and SHA-256 of the concatenated documents; JSON-able."""
        rows: dict[str, dict[str, int | str]] = {}
        for domain in self.domains:
            texts = [d.text.encode() for d in self.documents if d.domain == domain]
            digest = hashlib.sha256(b"".join(texts)).hexdigest()
            rows[domain] = {"documents": len(texts), "bytes": sum(map(len, texts)), "sha256": digest}
        return rows

    def held_out(self, fraction: float) -> Bool[np.ndarray, "documents"]:
        """Which documents training never sees: in each domain those of which the text's hash is lowest.

        The choice depends on the texts alone, so it hardly changes when documents come or go. A domain whose `fraction` is
        less than HOLDOUT_BYTES gives up more, to at most HOLDOUT_MOST of its documents. Raises ValueError for a domain of
        one document.
        """
        keys = np.array([_unit_hash(document.text, HOLDOUT_PERSON) for document in self.documents])
        sizes = np.array([len(document.text.encode()) for document in self.documents])
        labels = np.array(domain_numbers(self))
        chosen = np.zeros(len(keys), bool)
        for number, domain in enumerate(self.domains):
            members = np.flatnonzero(labels == number)
            if len(members) < 2:
                raise ValueError(
                    f"corpus: domain {domain!r} has {len(members)} document (copies are dropped); at least 2 are needed, "
                    "one of them to hold out: split its file into several"
                )
            members = members[np.argsort(keys[members], kind="stable")]
            before = np.cumsum(sizes[members]) - sizes[members]  # bytes held out already
            rank = np.arange(len(members))
            small = (before < HOLDOUT_BYTES) & (rank < HOLDOUT_MOST * len(members))
            chosen[members] = ((keys[members] < fraction) | small) & (rank < len(members) - 1)
            chosen[members[0]] = True
        return chosen


def _unit_hash(text: str, person: bytes) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=person).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def make_corpus(documents: Iterable[Document], domains: tuple[str, ...] | None = None) -> Corpus:
    """Drops copies; the first of several stays. `domains` defaults to the sorted names that occur.

    Raises ValueError if nothing is left.
    """
    documents = list(documents)
    kept = list(without_copies(documents))
    if not kept:
        raise ValueError("corpus: no document in it")
    present = {document.domain for document in kept}
    ordered = tuple(d for d in domains if d in present) if domains else tuple(sorted(present))
    return Corpus(ordered, kept, len(documents) - len(kept))


def without_copies(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents that are neither copies nor near copies of an earlier one, in order."""
    exact: set[bytes] = set()
    phrases: set[int] = set()
    hashes: dict[str, int] = {}  # a word's hash; Python's own differs from run to run
    for document in documents:
        words = re.findall(r"\w+", re.sub(r"\b(?:19|20)\d\d\b", "year", document.text.lower()))
        digest = hashlib.blake2b(" ".join(words).encode() if words else document.text.encode(), digest_size=16).digest()
        if digest in exact:
            continue
        exact.add(digest)
        for word in words:
            if word not in hashes:
                hashes[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        sample = _phrase_sample([hashes[word] for word in words])
        if sample and sum(phrase in phrases for phrase in sample) > COPIED_SHARE * len(sample):
            continue
        phrases.update(sample)
        yield document


def _phrase_sample(word_hashes: list[int]) -> set[int]:
    """Hashes of about one in SHINGLE_SAMPLE phrases; the same phrase is always sampled or never."""
    word_W = np.array(word_hashes, np.uint64)
    count = len(word_W) - SHINGLE_WORDS + 1
    if count < 1:
        return set()
    hash_P = np.zeros(count, np.uint64)
    for offset in range(SHINGLE_WORDS):
        hash_P = hash_P * np.uint64(0x9E3779B97F4A7C15) + word_W[offset : offset + count]
    hash_P ^= hash_P >> np.uint64(29)
    hash_P *= np.uint64(0xBF58476D1CE4E5B9)
    hash_P ^= hash_P >> np.uint64(32)
    return set(hash_P[hash_P % np.uint64(SHINGLE_SAMPLE) == 0].tolist())


def load_corpus(data: DataConfig) -> Corpus:
    """The corpus that `data.corpus` names (`embedded`, or globs of the user's files), and what is generated beside it.

    Raises ValueError, OSError.
    """
    if data.corpus == "embedded":
        corpus = make_corpus(embedded.documents(), embedded.DOMAINS)
    else:
        corpus = make_corpus(files.documents(data))
    if data.domain_bytes is not None:
        corpus = sampled(corpus, data.domain_bytes)
    return with_retrieval(corpus, data) if data.retrieval_bytes else corpus


def with_retrieval(corpus: Corpus, data: DataConfig) -> Corpus:
    """The corpus and, as its last domain, retrieval documents. Raises ValueError if it has a domain of that name."""
    if RETRIEVAL in corpus.domains:
        raise ValueError(f"retrieval_bytes: the corpus has a domain {RETRIEVAL!r} already; rename it or set retrieval_bytes=0")
    texts = retrieval_documents(data.retrieval_bytes, data.retrieval_context or data.seq_len)
    documents = [Document(RETRIEVAL, text) for text in texts]
    return Corpus((*corpus.domains, RETRIEVAL), [*corpus.documents, *documents], corpus.duplicates)


def sampled(corpus: Corpus, domain_bytes: int) -> Corpus:
    """Of each domain, documents chosen by the hash of their text until they hold `domain_bytes`; the order stays."""
    kept: set[int] = set()
    for domain in corpus.domains:
        members = [i for i, document in enumerate(corpus.documents) if document.domain == domain]
        members.sort(key=lambda i: _unit_hash(corpus.documents[i].text, SAMPLE_PERSON))
        sizes = np.cumsum([len(corpus.documents[i].text.encode()) for i in members])
        kept.update(members[: int(np.searchsorted(sizes, domain_bytes)) + 1])
    documents = [document for i, document in enumerate(corpus.documents) if i in kept]
    return Corpus(corpus.domains, documents, corpus.duplicates)


def fingerprint(data: DataConfig) -> str:
    """Changes whenever `load_corpus` would give other documents, at less cost."""
    source = embedded.fingerprint() if data.corpus == "embedded" else files.fingerprint(data)
    generated = f" {data.retrieval_bytes} {data.retrieval_context or data.seq_len}" if data.retrieval_bytes else ""
    return f"{source} {data.domain_bytes}{generated}"


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Printable lines: domain, documents, bytes, SHA-256; of `Corpus.summary()` or of `Data.summary["domains"]`."""
    lines = [f"{'domain':<12} {'documents':>9} {'bytes':>12}  sha256"]
    lines += [f"{name:<12} {row['documents']:>9,} {row['bytes']:>12,}  {row['sha256']}" for name, row in summary.items()]
    return "\n".join(lines)


def domain_numbers(corpus: Corpus) -> list[int]:
    """Each document's domain as a number."""
    number = {domain: i for i, domain in enumerate(corpus.domains)}
    return [number[document.domain] for document in corpus.documents]
