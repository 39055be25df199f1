"""Released tensors as Orbax checkpoints, one array each: written group by group, each complete or absent.

folder/tensors/00000, 00001, ...   Orbax checkpoints, {released name: array}
folder/tensors.json                what each array is, its group, and the file it came from; written last but for config.json
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dsv3_jax.interop.folder import CONFIG, Layout, Shard, is_file_name, read_json
from dsv3_jax.interop.run_folder import mapped_empty, read
from dsv3_jax.interop.safetensors import DTYPES, NAMES, Planned, is_text, quoted

TABLE = "tensors.json"
CHUNK_BYTES = 4 * 2**20  # of an array that Orbax compresses at a time
STORED = {np.dtype(ml_dtypes.float8_e8m0fnu): np.dtype(np.uint8)}  # what it does not know, as what it is stored


class OrbaxFolder:
    """Opens a folder that `convert` wrote. Raises ValueError, one line, if it is not a whole one."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        self.config_json = read_json(self.folder / CONFIG)
        table = read_json(self.folder / TABLE)
        try:
            self._group = {name: int(entry["group"]) for name, entry in table["tensors"].items()}
            self.entries = {n: (np.dtype(DTYPES[e["dtype"]]), tuple(e["shape"])) for n, e in table["tensors"].items()}
            shards = tuple(Shard(s["file"], tuple(s["names"]), s["metadata"], s["header"]) for s in table["shards"])
            self._layout = Layout(shards, table["index"])
            sound = _is_sound(self._layout, self.entries)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.folder / TABLE}: damaged: {quoted(error)}") from None
        if not sound:
            raise ValueError(f"{self.folder / TABLE}: damaged: expected each tensor in one shard, got something else")

    @property
    def where(self) -> str:
        return str(self.folder)

    def file_of(self, name: str) -> str:
        return str(group_folder(self.folder, self._group[name]))

    def tensor(self, name: str) -> np.ndarray:
        array = read(group_folder(self.folder, self._group[name]), name)
        dtype, shape = self.entries[name]
        if array.dtype == STORED.get(dtype):
            array = array.view(dtype)
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{self.file_of(name)}: tensor {name!r}: expected {dtype} {list(shape)}, got {array.dtype} {array.shape}"
            )
        return array

    def layout(self) -> Layout:
        return self._layout


def _is_sound(layout: Layout, entries: Mapping[str, Any]) -> bool:
    """Whether the shards hold each tensor once, under names that can be written to, and texts are texts."""
    texts = [text for shard in layout.shards for text in (shard.header, *shard.metadata, *shard.metadata.values())]
    return (
        sorted(name for shard in layout.shards for name in shard.names) == sorted(entries)
        and len({shard.file for shard in layout.shards}) == len(layout.shards)
        and all(is_file_name(shard.file) for shard in layout.shards)
        and is_text(*texts, *entries, *filter(None, [layout.index_text]))
        and all(type(size) is int and size >= 0 for _, shape in entries.values() for size in shape)
    )


def group_folder(folder: Path, group: int) -> Path:
    return folder / "tensors" / f"{group:05d}"


def grouped(tensors: Sequence[Planned], most_bytes: int) -> list[list[Planned]]:
    """Tensors in order, as many together as `most_bytes` hold; a larger one by itself."""
    groups: list[list[Planned]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.n_bytes > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    return groups


def save_group(path: Path, tensors: Sequence[Planned]) -> None:
    """One Orbax checkpoint, complete or absent. Raises OSError if the disk does not take it."""
    for left in path.parent.glob(f"{path.name}.*"):  # by a process that was killed
        shutil.rmtree(left)
    handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
    tree = {tensor.name: _whole(tensor) for tensor in tensors}
    args = ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda a: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # what it says of an error is said below, in one line
    try:
        with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))) as checkpointer:
            checkpointer.save(path.absolute(), args=args)
    except (ValueError, RuntimeError) as error:
        raise OSError(f"{path} could not be written: {quoted(' '.join(str(error).split()), 300)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _whole(tensor: Planned) -> np.ndarray:
    if tensor.whole is not None:
        return tensor.whole().view(STORED.get(tensor.dtype, tensor.dtype))
    whole, at = mapped_empty(tensor.shape, tensor.dtype), 0
    flat = whole.reshape(-1)
    for piece in tensor.pieces():
        flat[at : at + piece.size] = piece.reshape(-1)
        at += piece.size
    return whole.view(STORED.get(tensor.dtype, tensor.dtype))


def table_text(groups: Sequence[Sequence[Planned]], layout: Layout) -> str:
    tensors: Mapping[str, Any] = {
        t.name: {"dtype": NAMES[t.dtype], "shape": list(t.shape), "group": i} for i, group in enumerate(groups) for t in group
    }
    return json.dumps({"tensors": tensors, "shards": [s._asdict() for s in layout.shards], "index": layout.index_text})
