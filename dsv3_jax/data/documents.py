"""A document: the unit that corpora hold, that is held out whole, and that packing never reorders within."""

from collections.abc import Iterator
from typing import NamedTuple


class Document(NamedTuple):
    """One text of one domain."""

    domain: str
    text: str


def split_long(text: str, limit: int) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters, cut at line ends where there are any; joined, they give `text`."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start + limit // 2, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]
