"""What needs no network: byte n-grams and `lzma` on the held-out bytes, the marks that a trained model must beat.

The n-grams are interpolated with Witten-Bell smoothing. A context c that was followed n(c) times by t(c) different bytes gives

    p(b | c) = (n(c b) + t(c) p(b | c without its first byte)) / (n(c) + t(c)),

down to the empty context, which is interpolated with the uniform distribution over 256 bytes; an unseen context has t = n = 0
and hands its successor's distribution on. So every context has a distribution that sums to one.
"""

import json
import lzma
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt64

from dsv3_jax.data.pipeline import Data
from dsv3_jax.data.store import code_digest

CODE = ("baselines", "packing", "pipeline")  # what decides the numbers, given the tokens
CHUNK_BYTES = 1 << 22  # text counted at a time: bounds the memory
ORDERS = {"byte_bigram": 2, "byte_5gram": 5}  # n of the n-gram


@dataclass(frozen=True)
class NGramTable:
    """Counts of all n-grams of one n; an n-gram is its bytes as one big-endian number, its context that number >> 8."""

    grams: UInt64[np.ndarray, "grams"]  # sorted
    counts: Int[np.ndarray, "grams"]
    contexts: UInt64[np.ndarray, "contexts"]  # sorted
    context_counts: Int[np.ndarray, "contexts"]
    followers: Int[np.ndarray, "contexts"]  # different bytes seen after the context


def fit(texts: Iterable[bytes], order: int) -> list[NGramTable]:
    """Tables of the 1-grams ... `order`-grams within the texts; none spans two texts. `order` is at most 8."""
    assert 1 <= order <= 8
    tables: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(order)]
    for chunk in _chunks(texts):
        bytes_N, position_N = _joined(chunk)
        for n in range(1, order + 1):
            grams = _grams(bytes_N, n)[position_N >= n - 1]
            tables[n - 1] = [_merged([*tables[n - 1], np.unique(grams, return_counts=True)])]
    return [_table(*parts[0]) for parts in tables]


def probabilities(tables: list[NGramTable], text: bytes) -> Float[np.ndarray, "N"]:
    """The probability of each byte of `text` after the bytes before it, as many of them as the longest context has."""
    bytes_N, position_N = _joined([text])
    p_N = np.full(len(bytes_N), 1 / 256)
    for n, table in enumerate(tables, 1):
        grams_N = _grams(bytes_N, n)
        count_N = _looked_up(table.grams, table.counts, grams_N)
        total_N = _looked_up(table.contexts, table.context_counts, grams_N >> np.uint64(8))
        types_N = _looked_up(table.contexts, table.followers, grams_N >> np.uint64(8))
        known_N = (position_N >= n - 1) & (total_N > 0)
        p_N = np.where(known_N, (count_N + types_N * p_N) / np.maximum(total_N + types_N, 1), p_N)
    return p_N


def bits_per_byte(tables: list[NGramTable], texts: Iterable[bytes]) -> float:
    """Mean of -log2 p over all bytes of the texts."""
    p_N = np.concatenate([probabilities(tables, text) for text in texts])
    return float(-np.log2(p_N).mean())


def lzma_bits_per_byte(texts: Iterable[bytes]) -> float:
    """Size of the texts joined and compressed as well as `lzma` can; it has seen no training text."""
    joined = b"".join(texts)
    return 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / len(joined)


def baselines(data: Data) -> dict[str, dict[str, float]]:
    """Domain -> name of baseline -> bits per byte on `data.eval_texts`; cached beside the tokens.

    The n-grams learn from the training documents of all domains together, all of them, as the model would.
    """
    name = f"baselines-{data.config.seq_len}-{data.config.eval_sequences}-{code_digest(CODE)[:16]}.json"
    path = data.store.folder / name
    if not path.exists():
        _write(path, _measured(data))
    return json.loads(path.read_text())


def _measured(data: Data) -> dict[str, dict[str, float]]:
    tables = fit(data.train_texts(), max(ORDERS.values()))
    results = {}
    for domain, texts in zip(data.domains, data.eval_texts, strict=True):
        rows = {name: bits_per_byte(tables[:order], texts) for name, order in ORDERS.items()}
        results[domain] = rows | {"lzma": lzma_bits_per_byte(texts)}
    return results


def _write(path: Path, values: dict[str, dict[str, float]]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as beside:
        json.dump(values, beside, indent=1)
    os.replace(beside.name, path)


def _chunks(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Texts in lists of about CHUNK_BYTES bytes."""
    chunk: list[bytes] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _joined(texts: list[bytes]) -> tuple[UInt8[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """All bytes on end, and each byte's position in its own text."""
    lengths = np.array([len(text) for text in texts], np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.frombuffer(b"".join(texts), np.uint8), np.arange(lengths.sum()) - starts


def _grams(bytes_N: UInt8[np.ndarray, "N"], n: int) -> UInt64[np.ndarray, "N"]:
    """The n bytes that end at each position as one number; the first n - 1 are meaningless."""
    grams_N = np.zeros(len(bytes_N), np.uint64)
    for back in range(n):
        grams_N[back:] |= bytes_N[: len(bytes_N) - back].astype(np.uint64) << np.uint64(8 * back)
    return grams_N


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys and summed counts of several such pairs."""
    keys, inverse = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, inverse, np.concatenate([counts for _, counts in parts]))
    return keys, counts


def _table(grams: UInt64[np.ndarray, "grams"], counts: Int[np.ndarray, "grams"]) -> NGramTable:
    contexts, starts, followers = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
    return NGramTable(grams, counts, contexts, np.add.reduceat(counts, starts), followers)


def _looked_up(
    keys: UInt64[np.ndarray, "K"], values: Int[np.ndarray, "K"], wanted: UInt64[np.ndarray, "N"]
) -> Int[np.ndarray, "N"]:
    """The values of the wanted keys, 0 for keys that are not there."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
