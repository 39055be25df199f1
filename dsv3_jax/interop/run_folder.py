"""A checkpoint of a training run, met under released names: what reads a released folder reads a run too."""

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from dsv3_jax.config import Config
from dsv3_jax.interop.names import Leaf, bias_names, copies, leaves
from dsv3_jax.settings import from_dict

BIAS = "bias"
CHECKPOINTS = "checkpoints"


class RunFolder:
    """Opens a run's folder or its `checkpoints`, of which the newest complete one is taken, or one step's folder in there:
    reads the configuration, no array.

    `average` takes the exponential average of the weights instead. Raises ValueError, one line, if there is none.
    """

    def __init__(self, folder: str | Path, *, average: bool = False):
        steps = steps_of(folder)
        if not steps:
            raise ValueError(f"{folder}: expected a run with a complete checkpoint, found none")
        self.folder = steps[-1]
        self._item = self.folder / ("ema" if average else "state")
        if not self._item.is_dir():
            raise ValueError(f"{self.folder}: has no {self._item.name}; {'the run kept no average' if average else 'damaged'}")
        self._prefix = "" if average else "params."
        try:
            self.run: Config = from_dict(json.loads((self.folder / "meta" / "metadata").read_text())["config"])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.folder}: damaged: {' '.join(str(error).split())[:200]}") from None
        self._held: tuple[str, np.ndarray] | None = None

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def run_folder(self) -> Path:
        return self.folder.parent.parent

    @cached_property
    def _places(self) -> dict[str, tuple[Leaf, tuple[int, ...]]]:
        return {name: (leaf, at) for leaf in jax.tree.leaves(leaves(self.run.model)) for at, name in leaf.names()}

    @cached_property
    def entries(self) -> Mapping[str, tuple[np.dtype, tuple[int, ...]]]:
        """Leaf by leaf, as they lie on the disk."""
        found = {name: (self._dtype(leaf.path), leaf.released_shape) for name, (leaf, _) in self._places.items()}
        for name in bias_names(self.run.model):
            found[name] = (np.dtype(np.float32), (self.run.model.n_routed_experts,))
        return found | {name: found[original] for name, original in copies(self.run.model).items()}

    def file_of(self, name: str) -> str:
        return str(self._item)

    def tensor(self, name: str) -> np.ndarray:
        name = copies(self.run.model).get(name, name)
        if name in self._places:
            leaf, at = self._places[name]
            return leaf.released(self._leaf(leaf.path)[at])
        return self._bias[bias_names(self.run.model).index(name)]

    def _leaf(self, path: str) -> np.ndarray:
        """A whole stack, which lies in one piece on the disk; the one read last is kept."""
        if self._held is None or self._held[0] != path:
            self._held = None
            self._held = path, read(self._item, self._prefix + path)
        return self._held[1]

    @cached_property
    def _bias(self) -> np.ndarray:
        return read(self.folder / "state", BIAS)

    @cache  # noqa: B019  as long as the folder is in use
    def _dtype(self, path: str) -> np.dtype:
        return opened(self._item, self._prefix + path).dtype.numpy_dtype


def is_run(folder: str | Path) -> bool:
    """Whether this is what a `RunFolder` opens, and no released folder."""
    folder = Path(folder).absolute()
    return (folder / CHECKPOINTS).is_dir() or CHECKPOINTS in (folder.name, _step_s_parent(folder))


def _step_s_parent(folder: Path) -> str | None:
    return folder.parent.name if folder.name.isdecimal() else None


def steps_of(folder: str | Path) -> list[Path]:
    """Complete checkpoints of a run, of its folder of checkpoints, or of one of them: in the order of steps."""
    folder = Path(folder).absolute()
    if _step_s_parent(folder) == CHECKPOINTS:
        return [folder]
    checkpoints = folder if folder.name == CHECKPOINTS else folder / CHECKPOINTS
    found = [path for path in checkpoints.iterdir() if path.name.isdecimal()] if checkpoints.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def opened(folder: Path, name: str) -> Any:
    """An array of an Orbax checkpoint, unread. Raises ValueError, one line, if it is not there or damaged."""
    store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
    try:
        return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
    except ValueError as error:
        raise ValueError(f"{folder}: array {name!r} cannot be read: {str(error).splitlines()[0][:200]}") from None


def read(folder: Path, name: str) -> np.ndarray:
    """All of an array of an Orbax checkpoint. Raises ValueError, one line, if it is not there or damaged."""
    array = opened(folder, name)
    whole = mapped_empty(array.shape, array.dtype.numpy_dtype)
    try:
        tensorstore.array(whole, write=True).write(array).result()
    except ValueError as error:
        raise ValueError(f"{folder}: array {name!r} cannot be read: {str(error).splitlines()[0][:200]}") from None
    return whole


def mapped_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """`np.empty` of memory of its own: what `malloc` is given back it may keep, and then holds more than one array."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8, size).view(dtype).reshape(tuple(shape))
