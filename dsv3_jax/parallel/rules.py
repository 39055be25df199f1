"""From logical to mesh axes [§3.2]: one table, and the PartitionSpecs of every parameter that follow from it.

Each parameter has two specs. *Compute*: the piece that a device multiplies with, by the table. *State*: the compute piece cut
further over all data axes; moments and masters always lie so (ZeRO-1), parameters where the layout says so (ZeRO-3).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsv3_jax.model.spec import Spec
from dsv3_jax.parallel.mesh import BATCH_AXES, EXPERT, TENSOR

Rules = Mapping[str, str | tuple[str, ...] | None]

# The table. None: every device of an axis holds all of it; several axes: cut over all of them, the slowest first.
RULES: Rules = {
    "layers": None,
    "vocab": TENSOR,
    "embed": None,
    "embed_pair": None,
    "mlp": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "q_lora": None,
    "kv_lora": None,
    "router": None,
    "experts": EXPERT,
    "expert_mlp": TENSOR,
}

Dims = tuple[tuple[str, ...], ...]  # for each dimension, the mesh axes that it is cut over, the slowest first


def compute_dims(name: str, spec: Spec, sizes: Mapping[str, int], rules: Rules = RULES) -> Dims:
    """Mesh axes of each dimension of one parameter, by the table; an axis of one rank divides nothing and is left out.

    Raises ValueError, naming the parameter and the axis, if a mesh axis is used twice or does not divide its dimension.
    """
    dims: list[tuple[str, ...]] = []
    for size, logical in zip(spec.shape, spec.axes, strict=True):
        if logical not in rules:
            raise ValueError(f"{name}: logical axis {logical!r} has no rule; expected one of {', '.join(rules)}")
        rule = rules[logical]
        axes = () if rule is None else (rule,) if isinstance(rule, str) else rule
        for axis in axes:
            if any(axis in dim for dim in dims):
                raise ValueError(f"{name}: mesh axis {axis!r} is used twice, by {spec.axes}; change one of their rules")
        ranks = math.prod(sizes[axis] for axis in axes)
        if size % ranks:
            over = " x ".join(f"{axis!r} of {sizes[axis]}" for axis in axes)
            raise ValueError(
                f"{name}: {logical} of {size} does not divide over mesh axis {over}; "
                f"set {' and '.join(f'mesh_{axis}' for axis in axes)} to a divisor of {size}"
            )
        dims.append(tuple(axis for axis in axes if sizes[axis] > 1))
    return tuple(dims)


def state_dims(name: str, spec: Spec, sizes: Mapping[str, int], rules: Rules = RULES) -> Dims:
    """`compute_dims` cut further over every data axis that the parameter does not lie along yet.

    The innermost mesh axis cuts first, so that in a reduction what leaves a node is already summed and cut within it. It takes
    the first dimension of a matrix that it divides, whose pieces lie on end in memory; never the layers, which are scanned, and
    experts only if it must (XLA on TPUs would copy the stack to gather them). A gain, a vector, is left whole where nothing
    divides; for a matrix that raises ValueError, naming it and the axis.
    """
    dims = [list(dim) for dim in compute_dims(name, spec, sizes, rules)]
    order = sorted((i for i, logical in enumerate(spec.axes) if logical != "layers"), key=lambda i: spec.axes[i] == "experts")
    for axis in reversed(BATCH_AXES):
        if sizes[axis] == 1 or any(axis in dim for dim in dims):
            continue
        pieces = [math.prod(sizes[a] for a in dim) * sizes[axis] for dim in dims]
        fitting = [i for i in order if spec.shape[i] % pieces[i] == 0]
        if fitting:
            dims[fitting[0]].append(axis)
        elif spec.init != "ones":
            raise ValueError(
                f"{name}: no dimension of {dict(zip(spec.axes, spec.shape, strict=True))} divides over mesh axis {axis!r} of "
                f"{sizes[axis]} beside {[tuple(d) for d in dims]}; set another mesh_{axis}"
            )
    return tuple(tuple(dim) for dim in dims)


def partition_spec(dims: Dims) -> PartitionSpec:
    return PartitionSpec(*(None if not dim else dim[0] if len(dim) == 1 else dim for dim in dims))


def _is_spec(node: Any) -> bool:
    return isinstance(node, Spec)


def map_specs(function: Any, tree: Any) -> Any:
    """`function(name, spec)` over a tree of Spec; names are dotted paths."""

    def visit(path: tuple[Any, ...], spec: Spec) -> Any:
        return function(".".join(str(entry.key) for entry in path), spec)

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=_is_spec)


def compute_specs(tree: Any, sizes: Mapping[str, int]) -> Any:
    """Tree of Spec -> of PartitionSpec: what a device multiplies with. Raises ValueError as `compute_dims` does."""
    return map_specs(lambda name, spec: partition_spec(compute_dims(name, spec, sizes)), tree)


def state_specs(tree: Any, sizes: Mapping[str, int]) -> Any:
    """Tree of Spec -> of PartitionSpec: how moments and masters lie. Raises ValueError as `state_dims` does."""
    return map_specs(lambda name, spec: partition_spec(state_dims(name, spec, sizes)), tree)
