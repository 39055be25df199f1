"""One file of a released checkpoint: a header read with suspicion, tensors as views of the mapped file, and its writing.

The format: 8 bytes, the length of the header, little-endian; the header, JSON, name -> dtype, shape and byte range; then the
tensors, end to end. A stranger's file may say anything, so nothing is allocated or touched before the header has been
compared with the file's size, with itself, and range by range.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

# The largest header that is parsed. All 92,000 tensors of DeepSeek-V3 in one file would need half of it.
MAX_HEADER = 32 * 2**20


class Entry(NamedTuple):
    """One tensor: what it is and where its bytes lie in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start


class Header(NamedTuple):
    entries: dict[str, Entry]  # by name, in the order of their bytes
    metadata: dict[str, str]
    text: bytes  # as it stands in the file


def quoted(value: Any, most: int = 120) -> str:
    """A stranger's string in an error message: short, in one line."""
    text = str(value)
    return repr(text if len(text) <= most else text[:most] + "...")


def is_text(*values: Any) -> bool:
    """Whether these are strings that UTF-8 can hold; JSON can spell others."""
    return all(isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value) for value in values)


def read_header(path: Path) -> Header:
    """What a file says that it holds.

    Raises ValueError, one line with the file and the tensor, if the file is not a whole and consistent one.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, got {'no file' if not path.exists() else 'something else'}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path}: truncated, or no safetensors file: {size:,} bytes, of which the header claims {length:,}"
            )
        if length > MAX_HEADER:
            raise ValueError(f"{path}: a header of {length:,} bytes, expected at most {MAX_HEADER:,}")
        text = file.read(length)
    header = parse_json(text, str(path))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not is_text(*metadata, *metadata.values()):
        raise ValueError(f"{path}: __metadata__: expected an object of strings, got {quoted(metadata)}")
    first = 8 + length
    entries = {name: _entry(path, name, value, first, size) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end, before = first, "the header"
    for name, entry in ordered.items():
        if entry.start != end:
            what = "overlaps" if entry.start < end else f"leaves {entry.start - end:,} bytes unused after"
            raise ValueError(f"{path}: tensor {quoted(name)} {what} {before}")
        end, before = entry.stop, quoted(name)
    if end != size:
        raise ValueError(f"{path}: {size - end:,} bytes that belong to no tensor after {before}")
    return Header(ordered, metadata, text)


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without doubled keys. Raises ValueError, one line that begins with `where`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"{quoted(doubled)} is there twice")
        return values

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{where}: not a header: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{where}: damaged JSON: {' '.join(str(error)[:200].split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _entry(path: Path, name: str, value: Any, first: int, size: int) -> Entry:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{path}: tensor {quoted(name)}: {what}")

    if not is_text(name):
        raise wrong("a name that is no text")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise wrong("expected dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise wrong(f"dtype: expected one of {', '.join(DTYPES)}, got {quoted(kind)}")
    if not _is_sizes(shape) or len(shape) > 8:
        raise wrong(f"shape: expected a few non-negative integers, got {quoted(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise wrong(f"data_offsets: expected two non-negative integers, got {quoted(offsets)}")
    (start, stop), dtype = offsets, np.dtype(DTYPES[kind])
    expected = math.prod(shape) * dtype.itemsize
    if stop - start != expected:
        raise wrong(f"data_offsets {offsets} are {stop - start:,} bytes, but {kind} {shape} takes {expected:,}")
    if first + stop > size:
        raise wrong(f"ends at byte {first + stop:,} of a file of {size:,}: truncated")
    return Entry(dtype, tuple(shape), first + start, first + stop)


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


class MappedFile:
    """A file's tensors as read-only views of its mapped bytes: nothing is read before somebody looks at it."""

    def __init__(self, path: Path):
        self.path = path
        self.entries, self.metadata, self.header_text = read_header(path)

    def tensor(self, name: str) -> np.ndarray:
        """Raises KeyError if there is none of that name.

        Each tensor is mapped by itself, and unmapped with the last view of it: what has been read need not stay.
        """
        entry = self.entries[name]
        if entry.n_bytes == 0:
            return np.empty(entry.shape, entry.dtype)
        before = entry.start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            try:
                view = mmap.mmap(file.fileno(), before + entry.n_bytes, access=mmap.ACCESS_READ, offset=entry.start - before)
            except ValueError:
                raise ValueError(f"{self.path}: tensor {name!r}: the file has become shorter than its header says") from None
        return np.frombuffer(view, np.uint8)[before:].view(entry.dtype).reshape(entry.shape)


class Planned(NamedTuple):
    """A tensor to be written: what it will be, and a function that gives it in pieces along its first axis."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]
    whole: Callable[[], np.ndarray] | None = None  # all of it, where that is only a view

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_bytes(tensors: Sequence[Planned], metadata: Mapping[str, str], like: bytes = b"") -> bytes:
    """The header of a file that holds `tensors` in this order, its length before it; padded to 8 bytes, as is usual.

    Where the header `like` says just the same, it is taken as it stands.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.n_bytes]}
        at += t.n_bytes
    if like and parse_json(like, "header") == entries:
        text = like
    else:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, header: bytes, tensors: Sequence[Planned], progress: Callable[[int], None] = lambda n: None) -> None:
    """`header_bytes` and the tensors, beside their place, renamed when they are whole on the disk.

    `progress` hears of every piece's bytes. Raises OSError, naming the file, if the disk does not take it: what was begun is
    removed.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(header)
            for tensor in tensors:
                written = 0
                for piece in tensor.pieces():
                    assert piece.dtype == tensor.dtype, (tensor.name, piece.dtype, tensor.dtype)
                    data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                    file.write(data.data)
                    written += data.nbytes
                    progress(data.nbytes)
                assert written == tensor.n_bytes, (tensor.name, written, tensor.n_bytes)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
