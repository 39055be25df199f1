"""A released checkpoint's folder: config.json, and the tensors of one file or of many with an index, by name."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dsv3_jax.interop.safetensors import MAX_HEADER, MappedFile, parse_json, quoted

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class Shard(NamedTuple):
    """One file of a checkpoint: its tensors in the order of their bytes."""

    file: str
    names: tuple[str, ...]
    metadata: Mapping[str, str]
    header: str = ""  # as it stood in the file


class Layout(NamedTuple):
    """How a checkpoint is divided into files, to write it so again."""

    shards: tuple[Shard, ...]
    index_text: str | None = None  # text of the index file, where there is one


@runtime_checkable
@runtime_checkable
class Tensors(Protocol):
    """A checkpoint's tensors under their released names, in released orientation: (out, in)."""

    @property
    def where(self) -> str:
        """For messages."""

    @property
    def entries(self) -> Mapping[str, tuple[np.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor."""

    def tensor(self, name: str) -> np.ndarray:
        """One tensor; where it can be, a view of a mapped file."""

    def file_of(self, name: str) -> str:
        """Where a tensor lies, for messages."""


class ReleasedFolder:
    """Opens `folder`: reads config.json and every header, no tensor.

    Raises ValueError, one line with the file and the tensor, if anything does not fit together: a missing shard, a tensor
    that the index misplaces, misses or adds, two shards with the same one, a path outside the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: expected a checkpoint's folder, got {'a file' if self.folder.exists() else 'nothing'}")
        self.config_json = read_json(self.folder / CONFIG)
        self._file_of: dict[str, MappedFile] = {}
        for file, claimed in self._files():
            for name in file.entries:
                if name in self._file_of:
                    raise ValueError(f"{file.path}: tensor {quoted(name)} is in {self._file_of[name].path.name} too")
                if claimed is not None and name not in claimed:
                    raise ValueError(f"{file.path}: tensor {quoted(name)} is not there by {INDEX}")
                self._file_of[name] = file
            for name in claimed or ():
                if name not in file.entries:
                    raise ValueError(f"{file.path}: tensor {quoted(name)} is missing, {INDEX} says it is there")

    def _files(self) -> Iterator[tuple[MappedFile, set[str] | None]]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.exists() and index.exists():
            raise ValueError(f"{self.folder}: both {SINGLE} and {INDEX}, expected one; which is the checkpoint?")
        if not index.exists():
            if not single.exists():
                raise ValueError(f"{self.folder}: expected {SINGLE} or {INDEX}, found neither")
            yield MappedFile(single), None
            return
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map: expected an object of tensor names, got {quoted(weight_map)}")
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            if not is_file_name(shard):
                raise ValueError(
                    f"{index}: tensor {quoted(name)}: expected a .safetensors file of this folder, got {quoted(shard)}"
                )
            shards.setdefault(shard, set()).add(name)
        for shard in sorted(shards):
            yield MappedFile(self.folder / shard), shards[shard]

    @property
    def where(self) -> str:
        return str(self.folder)

    @cached_property
    def entries(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor, shard by shard in the order of their bytes."""
        return {name: (file.entries[name].dtype, file.entries[name].shape) for name, file in self._file_of.items()}

    def file_of(self, name: str) -> str:
        return str(self._file_of[name].path)

    def tensor(self, name: str) -> np.ndarray:
        return self._file_of[name].tensor(name)

    def layout(self) -> Layout:
        index = self.folder / INDEX
        files = {file.path.name: file for file in self._file_of.values()}
        shards = (Shard(n, tuple(f.entries), f.metadata, f.header_text.decode()) for n, f in files.items())
        return Layout(tuple(shards), index.read_bytes().decode() if index.exists() else None)


def is_file_name(name: Any) -> bool:
    """Whether this is the name of a shard, and no path out of its folder."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or name.startswith("."):
        return False
    return Path(name).name == name and name.endswith(".safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, one line, if it is not there, too large or none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is this a whole checkpoint?")
    if path.stat().st_size > MAX_HEADER:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, expected at most {MAX_HEADER:,}")
    return parse_json(path.read_bytes(), str(path))
