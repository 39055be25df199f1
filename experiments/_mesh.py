"""Flags of what serves on a mesh."""

import jax
from absl import flags

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.mesh import LAYOUTS, ServingPlacement, serving_placement


def define_mesh_flags(values: flags.FlagValues, layout: str | None) -> None:
    flags.DEFINE_string("layout", layout, f"serve on all devices as one of {', '.join(LAYOUTS)}", flag_values=values)
    flags.DEFINE_integer("tensor", None, "ranks that divide attention's heads (default: at most 4)", flag_values=values)
    flags.DEFINE_integer("data", 1, "groups of devices with all experts each", flag_values=values)
    flags.DEFINE_integer("spare", None, "expert slots a device beyond the fewest (default: the layout's)", flag_values=values)
    flags.DEFINE_integer("cpu_devices", None, "treat the CPU as so many devices", flag_values=values)


def split_cpu(values: flags.FlagValues) -> None:
    """To call before JAX runs. Raises ValueError for no positive number."""
    if values.cpu_devices is None:
        return
    if values.cpu_devices < 1:
        raise ValueError(f"--cpu_devices: expected at least 1, got {values.cpu_devices}")
    jax.config.update("jax_num_cpu_devices", values.cpu_devices)


def placement_from(values: flags.FlagValues, config: ModelConfig) -> ServingPlacement | None:
    """None without `--layout`. Raises ValueError for sizes that do not divide."""
    if values.layout is None:
        return None
    return serving_placement(values.layout, config, tensor=values.tensor, data=values.data, spare=values.spare)
