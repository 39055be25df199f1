"""Released tensors as Orbax checkpoints, one array each: written group by group, each complete or absent.

folder/tensors/00000, 00001, ...   Orbax checkpoints, {released name: array}
folder/tensors.json                what each array is, its group, and the file that it came from; written last but for config.json
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dsv3_jax.interop.folder import CONFIG, Shard, read_json
from dsv3_jax.interop.run_folder import opened
from dsv3_jax.interop.safetensors import DTYPES, NAMES, Planned

TABLE = "tensors.json"
CHUNK_BYTES = 64 * 2**20  # of an array that Orbax compresses at a time


class OrbaxFolder:
    """Opens a folder that `convert` wrote. Raises ValueError, one line, if it is not a whole one."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        self.config_json = read_json(self.folder / CONFIG)
        table = read_json(self.folder / TABLE)
        try:
            self._group = {name: int(entry["group"]) for name, entry in table["tensors"].items()}
            self.entries = {n: (np.dtype(DTYPES[e["dtype"]]), tuple(e["shape"])) for n, e in table["tensors"].items()}
            self._shards = [Shard(s["file"], tuple(s["names"]), s["metadata"]) for s in table["shards"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder / TABLE}: damaged: {error}") from None

    @property
    def where(self) -> str:
        return str(self.folder)

    def file_of(self, name: str) -> str:
        return str(group_folder(self.folder, self._group[name]))

    def tensor(self, name: str) -> np.ndarray:
        array = opened(group_folder(self.folder, self._group[name]), name).read().result()
        dtype, shape = self.entries[name]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{self.file_of(name)}: tensor {name!r}: expected {dtype} {list(shape)}, got {array.dtype} {array.shape}"
            )
        return array

    def shards(self) -> list[Shard]:
        return self._shards


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
    handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
    tree = {tensor.name: _whole(tensor) for tensor in tensors}
    args = ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda a: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))) as checkpointer:
            checkpointer.save(path.absolute(), args=args)
    except (ValueError, RuntimeError) as error:
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0][:200]})") from error
    finally:
        logging.set_verbosity(verbosity)


def _whole(tensor: Planned) -> np.ndarray:
    whole, at = np.empty(tensor.shape, tensor.dtype), 0
    flat = whole.reshape(-1)
    for piece in tensor.pieces():
        flat[at : at + piece.size] = piece.reshape(-1)
        at += piece.size
    return whole


def table_text(groups: Sequence[Sequence[Planned]], shards: Sequence[Shard]) -> str:
    tensors: Mapping[str, Any] = {
        t.name: {"dtype": NAMES[t.dtype], "shape": list(t.shape), "group": i} for i, group in enumerate(groups) for t in group
    }
    return json.dumps({"tensors": tensors, "shards": [shard._asdict() for shard in shards]})
