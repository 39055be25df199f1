"""Packing: documents on end, cut into windows that share one token [§4.1].

Window i covers the tokens i*T ... i*T + T of the stream, so that its T inputs predict T targets and every token of the stream
after the first is the target of exactly one window. (Predicting a document's BOS from its predecessor's EOS is masked by
whoever reads the segments.)
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int32


class TokenDocument(NamedTuple):
    """A document ready to be packed: `BOS ... EOS`."""

    tokens: Int32[np.ndarray, "T"]
    domain: int


class Window(NamedTuple):
    """One row of a batch. `segment_ids` counts the row's documents from 1; 0 is padding (with domain 0)."""

    tokens: Int32[np.ndarray, "S"]
    segment_ids: Int32[np.ndarray, "S"]
    domain_ids: Int32[np.ndarray, "S"]


class WindowIterator(grain.DatasetIterator[Window]):
    """Windows of `seq_len + 1` tokens over a random-access sequence of documents, finite or endless.

    The state is where the next window starts: a document's position in the sequence and an offset in its tokens. At the end
    of a finite sequence the last window is padded.
    """

    def __init__(self, documents: Sequence[TokenDocument] | grain.MapDataset, seq_len: int, pad: int):
        super().__init__()
        self._documents, self._seq_len, self._pad = documents, seq_len, pad
        self._start = (0, 0)
        self._held: tuple[int, TokenDocument] | None = None

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"document": self._start[0], "offset": self._start[1]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._start = (int(state["document"]), int(state["offset"]))

    def __next__(self) -> Window:
        size = self._seq_len + 1
        tokens_S, segments_S, domains_S = np.full(size, self._pad, np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
        (position, offset), start = self._start, self._start
        filled = segment = 0
        while filled < size and position < len(self._documents):
            document = self._document(position)
            piece = document.tokens[offset : offset + size - filled]
            part = slice(filled, filled + len(piece))
            segment += 1
            tokens_S[part], segments_S[part], domains_S[part] = piece, segment, document.domain
            filled += len(piece)
            start = (position, offset + len(piece) - 1)  # the last token so far opens the next window
            position, offset = position + 1, 0
        if filled < 2:  # nothing left to predict
            raise StopIteration
        self._start = start
        return Window(tokens_S, segments_S, domains_S)

    def _document(self, position: int) -> TokenDocument:
        """A long document spans many windows: the latest one is kept."""
        if self._held is None or self._held[0] != position:
            self._held = (position, self._documents[position])
        return self._held[1]


class ShuffledWindows(Iterator[Window]):
    """The windows of an endless iterator, permuted within blocks of `block`: neighbours of one document part company.

    The state is the block's (where it starts in the stream, its number) and how many of its windows have been given out.
    """

    def __init__(self, windows: WindowIterator, block: int, seed: int):
        self._windows, self._block, self._seed = windows, block, seed
        self._number, self._given = 0, 0
        self._origin, self._held = windows.get_state(), list[Window]()

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"origin": self._origin, "block": self._number, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._origin, self._number, self._given = state["origin"], int(state["block"]), int(state["given"])
        self._windows.set_state(self._origin)
        self._held = []

    def __next__(self) -> Window:
        if not self._held:
            order = np.random.default_rng((self._seed, self._number)).permutation(self._block)
            in_turn = [next(self._windows) for _ in range(self._block)]
            self._held = [in_turn[i] for i in order]
        window = self._held[self._given]
        self._given += 1
        if self._given == self._block:
            self._number, self._given, self._origin, self._held = self._number + 1, 0, self._windows.get_state(), []
        return window


def stack(
    windows: Sequence[Window | None], shape: tuple[int, int], seq_len: int, pad: int
) -> dict[str, Int32[np.ndarray, "A B S"]]:
    """A batch of `shape` [A, B] rows; a row without a window, and those beyond the last, are padding."""
    rows, size = shape[0] * shape[1], seq_len + 1
    assert len(windows) <= rows, (len(windows), shape)
    fills = {"tokens": pad, "segment_ids": 0, "domain_ids": 0}
    batch = {name: np.full((rows, size), fill, np.int32) for name, fill in fills.items()}
    for row, window in enumerate(windows):
        if window is not None:
            for name in fills:
                batch[name][row] = getattr(window, name)
    return {name: array.reshape(*shape, size) for name, array in batch.items()}
