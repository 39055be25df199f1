"""How a kernel's implementation is named, and where it runs.

`pallas_tpu` and `pallas_gpu` are compiled for their chips and run nowhere else. With `:interpret` the same kernel runs
anywhere, as plain array operations; `pallas_tpu:simulate` runs it on simulated memories, copies and semaphores, slowly, and
reports races.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu

# In the names of devices: GPUs for whose memories blocks are chosen, and TPUs for whose smaller ones they are not.
HOPPER = "H100", "H200", "H800", "H20"
EARLY = "TPU v2", "TPU v3", "TPU v4"


class Mode(NamedTuple):
    implementation: str
    interpret: Any = False  # as `pallas_call` takes it


def mode_of(name: str, known: Sequence[str]) -> Mode:
    """Raises ValueError if `name` is none of `known`, or no way to run it. `auto` is the first of them for this platform."""
    implementation, _, how = name.partition(":")
    ways: dict[str, Any] = {"": False, "interpret": True}
    if implementation == "pallas_tpu":
        ways["simulate"] = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    pallas = implementation.startswith("pallas_")
    if implementation not in known or how not in (ways if pallas else ("",)):
        raise ValueError(
            f"implementation: expected one of {', '.join(known)} (Pallas: also :interpret, on TPU :simulate), got {name!r}"
        )
    return Mode(implementation, ways[how])


def result(shape: tuple[int, ...], dtype: Any, like: Any, interpret: Any) -> jax.ShapeDtypeStruct:
    """An output of a kernel. On a mesh it varies over the axes that any of `like`, an operand or several, varies over.

    Raises ValueError where an interpreted kernel is asked for on a mesh, which JAX's interpreters do not run on.
    """
    types = [jax.typeof(a).manual_axis_type for a in jax.tree.leaves(like)]
    axes = types[0].update(varying=frozenset().union(*(t.varying for t in types)))
    if interpret and axes.varying:
        raise ValueError(
            "implementation: expected one that is compiled on a mesh, got an interpreted one; leave out :interpret or :simulate"
        )
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def _device() -> Any:
    """Of the mesh around, or else the default one."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def chip() -> str:
    """The kind of device, as JAX names it."""
    return _device().device_kind


def platform() -> str:
    """cpu, tpu or gpu."""
    return _device().platform


def chosen(name: str, otherwise: str, on: str | None = None, *, possible: bool = True) -> str:
    """`name`, or what "auto" stands for: the kernel on TPUs from v5 on and Hopper GPUs where it is `possible`, `otherwise`
    elsewhere.

    `on`: another platform than that of the device around.
    """
    if name != "auto":
        return name
    here = platform()
    kernels = {}
    if here != "tpu" or not any(kind in chip() for kind in EARLY):
        kernels["tpu"] = "pallas_tpu"
    if here != "gpu" or any(kind in chip() for kind in HOPPER):
        kernels["gpu"] = "pallas_gpu"
    return kernels.get(on or here, otherwise) if possible else otherwise
