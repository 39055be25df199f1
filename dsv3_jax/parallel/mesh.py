"""The device mesh [§3.2]: one constructor, four named axes, and the layouts that a run can choose by name.

Neighbouring devices are neighbours on the last axes: tensor ranks first, then expert ranks, so that a group of experts (and of
the router's node-limited selection) lies on one node, as in the report.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from dsv3_jax.config import Config, ParallelConfig

PIPE, DATA, EXPERT, TENSOR = AXES = ("pipe", "data", "expert", "tensor")
BATCH_AXES = (PIPE, DATA, EXPERT)  # sequences, and whatever is sharded "over all data axes", lie along these


class Layout(NamedTuple):
    """A named choice: default sizes of the mesh's axes (the data axis takes what they leave), and how parameters are stored.

    Optimiser state is sharded over all data axes in every layout (ZeRO-1); `shard_parameters` stores the parameters so too
    and gathers them layer by layer (ZeRO-3).
    """

    description: str
    expert: int = 1  # the most ranks of the expert axis; as many as divide both the devices and the experts
    tensor: int = 1
    shard_parameters: bool = False


ALL = 2**31  # as many as there are

LAYOUTS = {
    "single": Layout("one device"),
    "report": Layout("the report's: 64 expert ranks over 8 nodes, ZeRO-1 over the rest, no tensor parallelism", expert=64),
    "fully_sharded": Layout("parameters, gradients and optimiser state in pieces over all devices", shard_parameters=True),
    "tensor_expert": Layout("4 tensor ranks, as the report's attention when serving; experts over the rest", ALL, tensor=4),
}


def mesh_shape(parallel: ParallelConfig, n_devices: int, n_experts: int) -> dict[str, int]:
    """Size of every axis for `n_devices` devices: the sizes given, for the others the layout's, and data what is left.

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    layout = LAYOUTS[parallel.layout]
    if parallel.layout == "single":
        n_devices = 1
    given = {axis: getattr(parallel, f"mesh_{axis}") for axis in AXES}
    sizes = {axis: size for axis, size in given.items() if size is not None}

    def free() -> int:
        return n_devices // math.prod(sizes.values())

    if TENSOR not in sizes:
        sizes[TENSOR] = _largest_divisor(free(), layout.tensor)
    if EXPERT not in sizes:
        sizes[EXPERT] = _largest_divisor(math.gcd(free(), n_experts), layout.expert)
    if DATA not in sizes:
        sizes[DATA] = max(1, free())
    shape = {axis: sizes[axis] for axis in AXES}
    if math.prod(shape.values()) != n_devices:
        product = " x ".join(f"{axis} {size}" for axis, size in shape.items())
        raise ValueError(
            f"mesh: {product} = {math.prod(shape.values())} devices, expected {n_devices} (layout {parallel.layout}); "
            "set mesh_pipe, mesh_data, mesh_expert, mesh_tensor so that they multiply to it"
        )
    return shape


def _largest_divisor(number: int, most: int) -> int:
    """Of `number`, the largest divisor up to `most`; 1 for 0."""
    return max((d for d in range(1, min(number, most) + 1) if number % d == 0), default=1)


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.parallel` over `devices` (default: all of every process; `single` takes the first).

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if config.parallel.layout == "single":
        devices = devices[:1]
    shape = mesh_shape(config.parallel, len(devices), config.model.n_routed_experts)
    return make_axes(devices, **shape)


def make_axes(devices: Sequence[Any], **sizes: int) -> Mesh:
    """A mesh of the four axes, neighbouring devices on the last ones; axes that are not named have one rank."""
    grid = np.array(devices).reshape([sizes.get(axis, 1) for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
