"""Bits per byte by domain [§4.4, the Pile's column]: what a text costs under the model, independent of the tokenizer.

A document begins with BOS, which is read and not counted; every token after it is predicted once, and the bits of all are
divided by the bytes of the text. EOS is not asked for (validation during training does). A document longer than the window
goes by in windows: the first predicts as many tokens as the window reads; each further one reads a whole window that ends
where it ends, and predicts the tokens that are new, so that each of those has at least `overlap` tokens before it.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.data.documents import Document
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.evaluation.intervals import bootstrap_ratio
from dsv3_jax.evaluation.journal import Journal
from dsv3_jax.evaluation.logprob import Request, Scored, n_read, scored
from dsv3_jax.inference.score import Supply
from dsv3_jax.inference.text import prompt_ids


def digest(documents: Sequence[Document]) -> str:
    """SHA-256 of domains and texts."""
    found = hashlib.sha256()
    for document in documents:
        found.update(json.dumps(document).encode())
    return found.hexdigest()


def windows(ids: Sequence[int], window: int, overlap: int) -> list[Request]:
    """A document's requests: of `ids` all but the first are predicted, each once."""
    n, found, done = len(ids) - 1, [], 0
    while done < n:
        end = min(n, window if not done else done + window - overlap)
        found.append(Request(tuple(ids[max(0, end - window) : end + 1]), end - done))
        done = end
    return found


def check_overlap(window: int, overlap: int) -> None:
    """Raises ValueError for an overlap that leaves no new token."""
    if not 0 <= overlap < window:
        raise ValueError(f"--overlap: expected 0..{window - 1}, less than the window, got {overlap}")


def run_documents(
    supply: Supply, tokenizer: Tokenizer, documents: Sequence[Document], journal: Journal, *, window: int, overlap: int,
    batch_tokens: int, seed: int, on_records: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:  # fmt: skip
    """Scores what the journal lacks, and summarises: JSON-able."""
    check_overlap(window, overlap)
    requests, owners, n_windows = [], [], []
    for number, document in enumerate(documents):
        own = windows(prompt_ids(tokenizer, document.text), window, overlap)
        requests += own
        owners += [number] * len(own)
        n_windows.append(len(own))
    partial: dict[int, list[Scored]] = defaultdict(list)
    missing = {number for number in range(len(documents)) if number not in journal.finished}
    tokens = [0] * len(documents)
    for request, owner in zip(requests, owners, strict=True):
        tokens[owner] += request.n_scored
    # A document's windows go together, so that it is finished early.
    longest: dict[int, int] = defaultdict(int)
    for request, owner in zip(requests, owners, strict=True):
        longest[owner] = max(longest[owner], n_read(request))
    lengths = [longest[owner] for owner in owners]
    for batch in scored(supply, requests, batch_tokens, lengths=lengths, wanted=lambda index: owners[index] in missing):
        complete = []
        for index, found in batch.items():
            owner = owners[index]
            partial[owner].append(found)
            if len(partial[owner]) == n_windows[owner]:
                nats = -math.fsum(each.logprob for each in partial.pop(owner))
                if owner in missing:
                    complete.append(_outcome(owner, documents[owner], tokens[owner], nats))
        journal.write(complete)
        on_records(len(complete))
    return summary(journal.in_order(range(len(documents))), seed)


def _outcome(number: int, document: Document, n_tokens: int, nats: float) -> dict[str, Any]:
    if not math.isfinite(nats):
        raise FloatingPointError(f"document {number}: its log-probability is not finite; try --dtype=float32")
    n_bytes = len(document.text.encode())
    return {"record": number, "domain": document.domain, "bytes": n_bytes, "tokens": n_tokens, "bits": nats / math.log(2)}


def summary(outcomes: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """By domain and over all: bits per byte with an interval from drawing the documents again."""
    by_domain: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in outcomes:
        by_domain[each["domain"]].append(each)
    return {"domains": {name: _share(own, seed) for name, own in by_domain.items()}, "all": _share(outcomes, seed)}


def _share(outcomes: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    bits, n_bytes = (np.array([each[name] for each in outcomes], np.float64) for name in ("bits", "bytes"))
    return {
        "documents": len(outcomes),
        "bytes": int(n_bytes.sum()),
        "tokens": sum(each["tokens"] for each in outcomes),
        "bits_per_byte": bootstrap_ratio(bits, n_bytes, seed)._asdict(),
    }
