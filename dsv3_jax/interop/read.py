"""Released tensors into parameters: straight from the mapped file into the array, or the device's slice of it.

Beyond the arrays themselves memory for a block of one matrix is needed, whatever the model's size.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.quantize import FP8_BLOCK, Quantised
from dsv3_jax.interop.check import FP8
from dsv3_jax.interop.folder import Tensors
from dsv3_jax.interop.names import SCALE, Leaf, bias_names, leaves
from dsv3_jax.parallel.arrays import aligned_empty, from_pieces
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import LAYOUTS
from dsv3_jax.parallel.rules import partition_spec

Dtype = Literal["float32", "bfloat16", "stored"]
BLOCK = (256, 1024)  # rows and columns that are converted at a time
Index = tuple[slice, ...]


def check_dtype(dtype: str) -> None:
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype: expected one of {', '.join(get_args(Dtype))}, got {dtype!r}")


def load_parameters(
    source: Tensors, config: ModelConfig, dtype: Dtype, *, keep_fp8: bool = False, placement: Placement | None = None
) -> Any:
    """The parameter tree of `model_spec(config)`.

    `dtype`: "float32" or "bfloat16" for all of it, FP8 multiplied out unless `keep_fp8` (the router's matrix stays float32 if
    the file has it so); "stored" keeps what the file has, FP8 as `Quantised`. Under a `placement` each device reads its own
    slice. The source must have passed `check_tensors`. Raises ValueError where a mesh cannot divide FP8 kept as it is.
    """
    check_dtype(dtype)
    return read_tree(source, leaves(config), dtype, keep_fp8=keep_fp8, placement=placement)


def read_tree(source: Tensors, tree: Any, dtype: Dtype, *, keep_fp8: bool = False, placement: Placement | None = None) -> Any:
    """A tree of `Leaf` as parameters."""
    return jax.tree.map(lambda leaf: _read_leaf(source, leaf, target_dtype(source, leaf, dtype, keep_fp8), placement), tree)


def load_bias(source: Tensors, config: ModelConfig, placement: Placement | None = None) -> Float[Array, "L E"]:
    """The router bias, float32 whatever the rest is; one row a MoE layer. Zeros for a model without."""
    values = np.zeros((config.n_moe_layers, config.n_routed_experts), np.float32)
    for row, name in enumerate(bias_names(config)):
        values[row] = source.tensor(name).astype(np.float32)
    return jax.device_put(values, _sharding(PartitionSpec(), placement))


def _read_leaf(source: Tensors, leaf: Leaf, kind: np.dtype, placement: Placement | None) -> Any:
    """One parameter, its layers and experts stacked."""
    dims = placement.stored_dims(leaf.path, leaf.spec) if placement else ((),) * len(leaf.spec.shape)
    if kind != FP8:
        return _array(leaf.spec.shape, kind, partition_spec(dims), placement, lambda out, i: _fill(source, leaf, out, i))
    stack = len(leaf.stack)
    within = [axes for axes in dims[stack:] if axes]
    if within:
        raise ValueError(
            f"{leaf.path}: FP8 with its scales divides over experts only, got mesh axes {within} within a matrix; "
            "load it as bfloat16, or take a layout that leaves matrices whole"
        )
    n_out, n_in = leaf.released_shape
    spec = partition_spec((*dims[:stack], (), ()))
    values_shape = (*leaf.stack, n_in, n_out)
    scale_shape = (*leaf.stack, -(-n_in // FP8_BLOCK), -(-n_out // FP8_BLOCK))
    scale_kind = source.entries[leaf.name((0,) * stack) + SCALE][0]
    values = _array(values_shape, FP8, spec, placement, lambda out, i: _copy(source, leaf, out, i, ""))
    scale = _array(scale_shape, scale_kind, spec, placement, lambda out, i: _copy(source, leaf, out, i, SCALE))
    return Quantised(values, scale, leaf.sides)


def cuts_matrices(placement: Placement) -> bool:
    """Whether the layout divides a matrix, and not only whole matrices among devices."""
    return placement.tensor_axis is not None or LAYOUTS[placement.parallel.layout].shard_parameters


def target_dtype(source: Tensors, leaf: Leaf, dtype: Dtype, keep_fp8: bool = False) -> np.dtype:
    """What a parameter is read as: `dtype`, or for "stored" what all of its tensors can be held in."""
    kinds = {source.entries[name][0] for _, name in leaf.names()}
    exact = np.dtype(ml_dtypes.bfloat16) if kinds <= {np.dtype(ml_dtypes.bfloat16), FP8} else np.dtype(np.float32)
    if kinds == {FP8} and (keep_fp8 or dtype == "stored"):
        return FP8
    if dtype == "stored":
        return exact
    if "router" in leaf.spec.axes:
        return exact if dtype == "bfloat16" else np.dtype(np.float32)
    return np.dtype(jnp.dtype(dtype))


def _sharding(spec: PartitionSpec, placement: Placement | None) -> Sharding:
    return NamedSharding(placement.mesh, spec) if placement else SingleDeviceSharding(jax.local_devices()[0])


def _array(shape: tuple[int, ...], dtype: np.dtype, spec: PartitionSpec, placement: Placement | None, fill: Any) -> Array:
    def piece(index: Index) -> np.ndarray:
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        out = aligned_empty([stop - start for start, stop in bounds], dtype)
        fill(out, tuple(slice(*bound) for bound in bounds))
        return out

    return from_pieces(shape, _sharding(spec, placement), piece)


def _stack_places(leaf: Leaf, index: Index) -> Any:
    """(place in the piece, indices into the stacks) of every matrix of a piece."""
    starts = [part.start for part in index[: len(leaf.stack)]]
    sizes = [part.stop - part.start for part in index[: len(leaf.stack)]]
    for at in np.ndindex(*sizes):
        # A program's arguments are let go of some time after its results are there, and what JAX shares with NumPy only when
        # somebody collects: else half of one layer would still be held when the next is half read.
        gc.collect(0)
        yield at, tuple(a + start for a, start in zip(at, starts, strict=True))


def _copy(source: Tensors, leaf: Leaf, out: np.ndarray, index: Index, suffix: str) -> None:
    """Matrices (or their scales) as they are, turned over."""
    for place, at in _stack_places(leaf, index):
        released, target = source.tensor(leaf.name(at) + suffix), out[place].T
        for rows, columns in _blocks(*released.shape):
            target[rows, columns] = released[rows, columns]


def _fill(source: Tensors, leaf: Leaf, out: np.ndarray, index: Index) -> None:
    sides = index[len(leaf.stack) :]
    for place, at in _stack_places(leaf, index):
        name = leaf.name(at)
        scale = source.tensor(name + SCALE) if source.entries[name][0] == FP8 else None
        fill_matrix(out[place], leaf, source.tensor(name), scale, sides)


def read_part(source: Tensors, leaf: Leaf, sides: Sequence[slice], kind: np.dtype) -> np.ndarray:
    """A part of one matrix: `leaf` has no stacks."""
    out = np.empty([part.stop - part.start for part in sides], kind)
    _fill(source, leaf, out, tuple(sides))
    return out


def fill_matrix(out: np.ndarray, leaf: Leaf, released: np.ndarray, scale: np.ndarray | None, sides: Sequence[slice]) -> None:
    """Part `sides` of one of our matrices, from the released one; some rows of it at a time."""
    if released.ndim == 1:
        out[...] = as_float(released[sides[0]], out.dtype)
        return
    if leaf.n_in:
        own = (math.prod(out.shape[: leaf.n_in]), math.prod(out.shape[leaf.n_in :]))
        target = out.reshape(own).T
        columns, rows = _flat(leaf.sides[: leaf.n_in], sides[: leaf.n_in]), _flat(leaf.sides[leaf.n_in :], sides[leaf.n_in :])
    else:
        target, (rows, columns) = out, (np.arange(part.start, part.stop) for part in sides)
    for r, c in _blocks(len(rows), len(columns)):
        part = _picked(released, rows[r], columns[c])
        if scale is not None:
            part = as_float(part, np.dtype(np.float32))
            part *= scale[rows[r] // FP8_BLOCK].astype(np.float32)[:, columns[c] // FP8_BLOCK]
        target[r, c] = as_float(part, out.dtype)


def _blocks(n_rows: int, n_columns: int) -> Iterator[tuple[slice, slice]]:
    """A matrix in pieces that stay in the cache while they are turned over, which is twice as fast as row by row."""
    for row in range(0, n_rows, BLOCK[0]):
        for column in range(0, n_columns, BLOCK[1]):
            yield slice(row, min(row + BLOCK[0], n_rows)), slice(column, min(column + BLOCK[1], n_columns))


def _picked(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Some rows and columns, ascending; a view where they are neighbours."""
    r, c = (slice(at[0], at[-1] + 1) if at[-1] - at[0] + 1 == len(at) else at for at in (rows, columns))
    assert isinstance(r, slice) or isinstance(c, slice), "only one side of a matrix has heads"
    return matrix[r, c]


def _flat(sizes: Sequence[int], index: Sequence[slice]) -> np.ndarray:
    """Numbers, in row-major order, of a box's elements."""
    return np.arange(math.prod(sizes)).reshape(sizes)[tuple(index)].reshape(-1)


_FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def as_float(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` in `dtype`; FP8 by table, which is several times faster than a cast."""
    if values.dtype == FP8 and dtype == np.float32:
        return np.take(_FP8_VALUES, np.ascontiguousarray(values).view(np.uint8))
    if values.dtype in (FP8, np.float64) and dtype != values.dtype:
        return values.astype(np.float32).astype(dtype)
    return values.astype(dtype, copy=False)
