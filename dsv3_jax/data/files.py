"""The user's own files as a corpus: text, JSON Lines and Parquet, by glob; nothing unreadable is passed over in silence."""

import glob
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_jax.config import DataConfig
from dsv3_jax.data.documents import Document, split_long

PIECE = 100_000  # characters; a longer text is several documents, so that one large file can be held out in part


def documents(data: DataConfig) -> Iterator[Document]:
    """The records of all files that match the globs in `data.corpus`, in the order of the files' names.

    A domain is the parent folder's name (`domain_from="path"`) or the records' field of that name. Raises ValueError that
    names the file, and the line where there is one: no file matches; a file is empty or not UTF-8; a record is not JSON, has
    no such field, or holds something else than text there.
    """
    for path in matching_files(data.corpus):
        count = 0
        for domain, text in _records(path, data):
            count += 1
            for piece in split_long(text, PIECE):
                yield Document(domain, piece)
        if not count:
            raise ValueError(f"{path}: no record in this file; remove it or name other files in corpus")


def fingerprint(data: DataConfig) -> str:
    """Digest of the files' names and contents and of how they are read."""
    digest = hashlib.sha256(repr((data.domain_from, data.text_field)).encode())
    for path in matching_files(data.corpus):
        with path.open("rb") as stream:
            digest.update(f"{path}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def matching_files(globs: str) -> list[Path]:
    """Files that match any of the comma-separated globs, sorted. Raises ValueError if one matches nothing."""
    paths: set[Path] = set()
    for pattern in filter(None, map(str.strip, globs.split(","))):
        found = [p for p in map(Path, glob.glob(str(Path(pattern).expanduser()), recursive=True)) if p.is_file()]
        if not found:
            raise ValueError(f"corpus: no file matches {pattern!r}")
        paths.update(p.resolve() for p in found)
    if not paths:
        raise ValueError("corpus: expected `embedded` or a glob of files, got nothing")
    return sorted(paths)


def _records(path: Path, data: DataConfig) -> Iterator[tuple[str, str]]:
    """(domain, text) of every record of a file."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; remove it or name other files in corpus")
    if path.suffix == ".jsonl":
        for number, line in enumerate(_decoded(path).split("\n"), 1):
            if line.strip():
                yield _fields(f"{path}, line {number}", parsed(f"{path}, line {number}", line), data, path)
    elif path.suffix == ".parquet":
        for number, row in enumerate(_parquet_rows(path, data), 1):
            yield _fields(f"{path}, row {number}", row, data, path)
    elif data.domain_from != "path":
        raise ValueError(f"{path}: a text file has no field {data.domain_from!r}; use domain_from=path or .jsonl or .parquet")
    else:
        text = _decoded(path)
        if not text.strip():
            raise ValueError(f"{path}: there is nothing but white space in this file; remove it or name other files in corpus")
        yield path.parent.name, text


def _decoded(path: Path) -> str:
    """The file's text, bytes unchanged: no translation of line ends."""
    raw = path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8, got byte 0x{raw[error.start]:02x}") from None


def parsed(place: str, line: str) -> Any:
    """A line of JSON. Raises ValueError, one line that begins with `place`, for what is none or Python cannot read."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{place}: brackets within brackets, too deep to be read") from None
    except ValueError:  # Python's limit, not JSON's
        raise ValueError(f"{place}: expected numbers of at most {sys.get_int_max_str_digits():,} digits, got more") from None


def _fields(place: str, record: Any, data: DataConfig, path: Path) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object, got {type(record).__name__}")
    text = _text(place, record, data.text_field)
    domain = path.parent.name if data.domain_from == "path" else _text(place, record, data.domain_from)
    return domain, text


def _text(place: str, record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise ValueError(f"{place}: no field {field!r}, only {', '.join(sorted(record)) or 'none'}")
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        shown = "empty text" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{place}: expected text in field {field!r}, got {shown}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: field {field!r} holds half of a surrogate pair, which is no text") from None
    return value


def _parquet_rows(path: Path, data: DataConfig) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow; install the extra: pip install 'dsv3_jax[parquet]'") from None
    wanted = [data.text_field] + ([data.domain_from] if data.domain_from != "path" else [])
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = [name for name in wanted if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"{path}: no column {missing[0]!r}, only {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=wanted):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a readable Parquet file: {message}") from None
