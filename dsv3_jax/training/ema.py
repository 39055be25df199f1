"""Exponential moving average of the parameters [§3.2.3], held in NumPy on the host, off the device.

The average is debiased as Adam's moments are: after n updates, parameters seen k updates ago weigh decay^k, normalised to
sum to one. So it starts as the first parameters it is shown and never remembers the initialisation.

Where several processes share a run, each holds the pieces of the average that its devices hold of the moments.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from dsv3_jax.parallel.arrays import Key, key_of


class Pieces:
    """What one process has of one array that lies on a mesh; a leaf to JAX's trees. NumPy, each piece once."""

    def __init__(self, shape: tuple[int, ...], sharding: Sharding, parts: dict[Key, np.ndarray]):
        self.shape, self.sharding, self.parts = shape, sharding, parts

    @staticmethod
    def zeros(shape: tuple[int, ...], sharding: Sharding) -> "Pieces":
        keys = _devices(sharding, shape)
        return Pieces(shape, sharding, {key: np.zeros([stop - start for start, stop in key], np.float32) for key in keys})

    @staticmethod
    def of(array: jax.Array) -> "Pieces":
        """Copies of the pieces that are here."""
        parts = {key_of(shard.index, array.shape): shard for shard in array.addressable_shards}
        return Pieces(array.shape, array.sharding, {key: np.array(shard.data) for key, shard in parts.items()})

    def cut(self, array: jax.Array) -> dict[Key, np.ndarray]:
        """The same pieces of `array`, which lies in these or in larger ones of the same devices."""
        shards = {shard.device: shard for shard in array.addressable_shards}
        on_host: dict[Key, np.ndarray] = {}  # of several devices that hold the same one, the first
        pieces = {}
        for key, device in _devices(self.sharding, self.shape).items():
            held = key_of(shards[device].index, self.shape)
            if held not in on_host:
                on_host[held] = np.asarray(shards[device].data)
            inside = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(key, held, strict=True))
            pieces[key] = on_host[held][inside]
            assert pieces[key].shape == self.parts[key].shape, (key, held)
        return pieces

    def array(self) -> jax.Array:
        """All processes' pieces as one array of the mesh. Copies: a device may read NumPy's memory in place."""

        def piece(index: Any) -> np.ndarray:
            return self.parts[key_of(index, self.shape)].copy()

        return jax.make_array_from_callback(self.shape, self.sharding, piece)


def _devices(sharding: Sharding, shape: tuple[int, ...]) -> dict[Key, jax.Device]:
    """The pieces of this process, each with one of the devices that hold it."""
    here = sharding.addressable_devices_indices_map(shape)
    return {key_of(index, shape): device for device, index in here.items() if index is not None}


class Ema(NamedTuple):
    average: Any  # tree of float32 NumPy arrays, like the parameters; of `Pieces` where there are several processes
    n_updates: int


def init_ema(params: Any) -> Ema:
    """`params`: tree of arrays (or shapes) to mirror; the zeros have no weight in any later average.

    With several processes, what is held here is what is here of arrays that lie as `params` says.
    """
    if jax.process_count() > 1:
        return Ema(jax.tree.map(lambda p: Pieces.zeros(p.shape, p.sharding), params), 0)
    return Ema(jax.tree.map(lambda p: np.zeros(p.shape, np.float32), params), 0)


def update_ema(ema: Ema, params: Any, decay: float) -> Ema:
    """The average with `params` (a tree of arrays) taken in. Writes into `ema.average`, which must not be used afterwards."""
    n_updates = ema.n_updates + 1
    weight = np.float32((1 - decay) / (1 - decay**n_updates))

    def take_in(average: np.ndarray, p: Any) -> None:
        difference = np.asarray(p).astype(np.float32) - average
        difference *= weight
        average += difference

    def take_in_any(average: Any, p: Any) -> Any:
        if isinstance(average, Pieces):
            for key, piece in average.cut(p).items():
                take_in(average.parts[key], piece)
        else:
            take_in(average, p)
        return average

    return Ema(jax.tree.map(take_in_any, ema.average, params), n_updates)


def whole_average(ema: Ema) -> Any:
    """What is to be stored: NumPy arrays of one process, or arrays of the mesh of several."""
    return jax.tree.map(lambda a: a.array() if isinstance(a, Pieces) else a, ema.average)
