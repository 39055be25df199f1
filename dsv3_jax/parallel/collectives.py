"""What one device's program says to the others [§3.2]: gathering parameters, reducing gradients, summing over an axis.

The training step is one `shard_map`: the model's functions see a device's own sequences and its own pieces of the parameters,
and call the few functions below where they need the others. A `placement` of None means that there are none.

`shard_map` tracks over which mesh axes a value varies, and differentiates accordingly: what is equal on all ranks of an axis
but used with what is not gets its gradient summed over that axis. Where a gradient is *not* to be summed yet, the parameter is
first marked as varying (`own_copies`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ParallelConfig
from dsv3_jax.model.spec import Spec
from dsv3_jax.parallel.mesh import BATCH_AXES, EXPERT, LAYOUTS, TENSOR
from dsv3_jax.parallel.rules import Dims, compute_dims, map_specs, partition_spec, state_dims

BATCH_SPEC = PartitionSpec(None, BATCH_AXES)  # as `Placement.batch_spec`, for any mesh


@dataclass(frozen=True)
class Placement:
    """A mesh and how things lie on it; hashable, the same for every device."""

    mesh: Mesh
    parallel: ParallelConfig

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.mesh.shape

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The axes that divide the sequences of a micro-batch. Those of one rank are left out: a sum over them is a copy."""
        return tuple(axis for axis in BATCH_AXES if self.sizes[axis] > 1)

    @property
    def batch_spec(self) -> PartitionSpec:
        """How a batch lies: [micro-batches, sequences, ...]."""
        return PartitionSpec(None, self.batch_axes)

    @property
    def batch_ranks(self) -> int:
        """Devices among which the sequences of a micro-batch are divided."""
        return self.mesh.size // self.sizes[TENSOR]

    @property
    def tensor_axis(self) -> str | None:
        """The axis that divides heads, widths and the vocabulary, if any does."""
        return TENSOR if self.sizes[TENSOR] > 1 else None

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """The axes that divide the experts."""
        return (EXPERT,)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes whose ranks have different tokens where experts compute."""
        return self.batch_axes

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def stored_dims(self, name: str, spec: Spec) -> Dims:
        """How a parameter lies between uses: a gain by the table, a matrix as the layout says."""
        in_pieces = LAYOUTS[self.parallel.layout].shard_parameters and spec.init != "ones"
        return (state_dims if in_pieces else compute_dims)(name, spec, self.sizes)

    def stored_specs(self, tree: Any) -> Any:
        """Tree of Spec -> of PartitionSpec."""
        return map_specs(lambda name, spec: partition_spec(self.stored_dims(name, spec)), tree)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def varying_like(sources: Any, tree: Any) -> Any:
    """`tree` made to vary over every mesh axis that any of the arrays `sources` varies over; outside shard_map, `tree`.

    Loops want it of what they carry, and `custom_vjp` of what it differentiates.
    """
    return varying(tree, frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(sources))))


def varying(tree: Any, axes: Any) -> Any:
    """`tree` made to vary over `axes`."""

    def mark(a: Array) -> Array:
        missing = tuple(axis for axis in axes if axis not in jax.typeof(a).manual_axis_type.varying)
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(mark, tree)


def sum_over_tensor(x: Array, placement: Placement | None) -> Array:
    """The sum of the tensor ranks' partial products."""
    return lax.psum(x, placement.tensor_axis) if placement and placement.tensor_axis else x


def sum_over_batch(tree: Any, placement: Placement | None) -> Any:
    """Sums over the ranks that hold different sequences: what turns a share into the whole batch's value."""
    axes = placement.batch_axes if placement else ()
    return jax.tree.map(lambda a: lax.psum(varying(a, axes), axes), tree) if axes else tree


def own_copies(params: Any, placement: Placement | None) -> Any:
    """Parameters whose gradients stay the device's own, until `reduced` sums them."""
    return varying(params, placement.batch_axes) if placement else params


def gathered(params: Any, specs: Any, placement: Placement | None, dtype: str) -> Any:
    """The pieces that the device computes with, of parameters (a tree like `specs`) that are stored in smaller ones.

    Matrices travel in the compute dtype, the router's in its own. Differentiated, a gather is a reduce-scatter.
    """
    if placement is None or not LAYOUTS[placement.parallel.layout].shard_parameters:
        return params

    def gather(name: str, spec: Spec, weight: Array) -> Array:
        stored, compute = placement.stored_dims(name, spec), compute_dims(name, spec, placement.sizes)
        if stored != compute and "router" not in spec.axes:
            weight = weight.astype(dtype)
        # One axis after the other: XLA turns a gather over all axes of a torus at once into an all-reduce, twice the bytes.
        for axis, i in reversed(_added(stored, compute)):
            weight = lax.all_gather(weight, axis, axis=i, tiled=True)
        return weight

    return _with_specs(gather, specs, params)


def reduced(gradients: Any, specs: Any, placement: Placement | None) -> Any:
    """Every device's own gradients, of parameters as stored, summed over the batch's axes into pieces as the state lies."""
    if placement is None:
        return gradients

    def reduce(name: str, spec: Spec, gradient: Array) -> Array:
        stored, state = placement.stored_dims(name, spec), state_dims(name, spec, placement.sizes)
        for axis, i in _added(state, stored):
            gradient = lax.psum_scatter(gradient, axis, scatter_dimension=i, tiled=True)
        whole = tuple(axis for axis in placement.batch_axes if not any(axis in dim for dim in state))
        return lax.psum(gradient, whole) if whole else gradient

    return _with_specs(reduce, specs, gradients)


def lookup(table_VD: Float[Array, "V D"], tokens: Int[Array, "B T"], placement: Placement | None) -> Float[Array, "B T D"]:
    """Rows of a table whose rows are divided among the tensor ranks: each gives its own, and zeros for the others'."""
    if placement is None or placement.tensor_axis is None:
        return table_VD[tokens]
    n_own = table_VD.shape[0]
    own = tokens - lax.axis_index(TENSOR) * n_own
    is_own = (own >= 0) & (own < n_own)
    return sum_over_tensor(jnp.where(is_own[:, :, None], table_VD[jnp.clip(own, 0, n_own - 1)], 0), placement)


def _added(finer: Dims, coarser: Dims) -> list[tuple[str, int]]:
    """The axes by which `finer` is cut beyond `coarser`, and of which dimension, in the order of the cuts: innermost first."""
    assert all(f[: len(c)] == c for f, c in zip(finer, coarser, strict=True)), (finer, coarser)
    cuts = {axis: i for i, (f, c) in enumerate(zip(finer, coarser, strict=True)) for axis in f[len(c) :]}
    return [(axis, cuts[axis]) for axis in reversed(BATCH_AXES) if axis in cuts]


def _with_specs(function: Any, specs: Any, tree: Any) -> Any:
    """`function(name, spec, leaf)` over a tree of Spec and one of arrays like it."""
    names = map_specs(lambda name, spec: (name, spec), specs)
    return jax.tree.map(lambda leaf, named: function(*named, leaf), tree, names, is_leaf=None)
