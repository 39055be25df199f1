"""Between hosts and the mesh [§3.2]: arrays put into their pieces, rows to their hosts, and what processes tell each other.

Whatever happens here happens in every process alike; one process alone needs none of it to wait for anybody.
"""

import collections
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int

from dsv3_jax.parallel.collectives import BATCH_SPEC, Placement
from dsv3_jax.parallel.mesh import AXES, BATCH_AXES

Slices = Any  # a tuple of slices, as JAX hands them out
Key = tuple[tuple[int, int], ...]  # where a piece lies: start and stop in every dimension; hashable, unlike slices


def key_of(index: Slices, shape: Sequence[int]) -> Key:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def to_mesh(array: Any, sharding: Sharding, dtype: Any = None) -> Array:
    """A host array that every process has, in pieces: no device sees more of it than its own. Copied."""
    kind = dtype or array.dtype
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].astype(kind))


ALIGNMENT = 64  # bytes; JAX on CPU takes an array that lies so as it is, and copies any other


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """`np.empty` where JAX on CPU can use it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(tuple(shape))


def from_pieces(shape: tuple[int, ...], sharding: Sharding, piece: Callable[[Slices], np.ndarray]) -> Array:
    """An array that is whole nowhere: `piece(index)` is called once for each different piece of this process' devices.

    It returns a fresh array, which the last device to need it takes over.
    """
    made: dict[Key, np.ndarray] = {}
    indices = sharding.addressable_devices_indices_map(shape).values()
    left = collections.Counter(key_of(index, shape) for index in indices if index is not None)

    def of_device(index: Slices) -> np.ndarray:
        key = key_of(index, shape)
        if key not in made:
            made[key] = piece(index)
        left[key] -= 1
        if left[key] == 0:
            return made.pop(key)
        own = aligned_empty(made[key].shape, made[key].dtype)
        own[...] = made[key]
        return own

    return jax.make_array_from_callback(shape, sharding, of_device)


def zeros_on_mesh(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Array:
    """Zeros that lie as `sharding` says."""

    def piece(index: Slices) -> np.ndarray:
        return np.zeros([stop - start for start, stop in key_of(index, shape)], dtype)

    return from_pieces(shape, sharding, piece)


def rows_by_process(placement: Placement, n_rows: int) -> dict[int, Int[np.ndarray, "rows"]]:
    """For each process, the rows of a micro-batch of `n_rows` that its devices hold, ascending."""
    rows: dict[int, set[int]] = {}
    device: Any
    for device, index in placement.sharding(BATCH_SPEC).devices_indices_map((1, n_rows)).items():
        assert index is not None
        rows.setdefault(device.process_index, set()).update(range(*index[1].indices(n_rows)))
    return {process: np.array(sorted(own)) for process, own in rows.items()}


def check_batch(placement: Placement, n_rows: int, name: str) -> None:
    """Raises ValueError if a micro-batch's rows do not divide among the ranks; `name` is the setting that says how many."""
    ranks = placement.batch_ranks
    if n_rows % ranks:
        axes = " x ".join(f"{axis} {placement.sizes[axis]}" for axis in BATCH_AXES)
        raise ValueError(f"{name}: expected a multiple of {ranks}, the ranks that share a batch ({axes}), got {n_rows}")


def check_streams(placement: Placement, n_rows: int, n_streams: int) -> None:
    """Raises ValueError if two processes would have to read the same stream of documents for different rows."""
    shares = rows_by_process(placement, n_rows)

    def whole(n: int) -> bool:
        size = n_rows // n
        return all(len(rows) == size * len({int(row) // size for row in rows}) for rows in shares.values())

    fitting = [n for n in range(1, n_rows + 1) if n_rows % n == 0 and whole(n)]
    if n_streams not in fitting:
        raise ValueError(
            f"data_streams: expected a multiple of {fitting[0]} that divides {n_rows}, so that each of {len(shares)} processes "
            f"reads its own documents, got {n_streams}; set data_streams={fitting[0]} from the first step on"
        )


def batch_to_mesh(batch: Mapping[str, np.ndarray], rows: Any, n_rows: int, placement: Placement) -> dict[str, Array]:
    """Arrays [A, rows, ...], the rows of a micro-batch of `n_rows` that are here, as one array of all processes."""
    sharding, row_at = placement.sharding(BATCH_SPEC), np.asarray(rows)

    def put(array: np.ndarray) -> Array:
        shape = (array.shape[0], n_rows, *array.shape[2:])

        def piece(index: Slices) -> np.ndarray:
            start, stop = index[1].indices(n_rows)[:2]
            first = int(np.searchsorted(row_at, start))
            assert np.array_equal(row_at[first : first + stop - start], np.arange(start, stop)), (rows, index)
            return array[(index[0], slice(first, first + stop - start), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, piece)

    return {name: put(array) for name, array in batch.items()}


# --- what processes tell each other; all of them must ask in the same order


def told_by_all(value: Any) -> list[Any]:
    """Every process's `value` (JSON-able), in the order of processes."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([own.size], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: own.size] = own
    texts = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def told_by_first(value: Any) -> Any:
    """Process 0's `value` (JSON-able)."""
    return told_by_all(value if jax.process_index() == 0 else None)[0]


@jax.jit
def _largest(flags: Int[Array, "devices"]) -> Int[Array, ""]:
    return flags.max()


def any_of(flag: bool, placement: Placement) -> Array:
    """Whether any process says so; the answer may not be there yet, and whoever reads it waits."""
    sharding = NamedSharding(placement.mesh, PartitionSpec(AXES))
    return _largest(jax.make_array_from_callback((placement.mesh.size,), sharding, lambda index: np.array([flag], np.int32)))
