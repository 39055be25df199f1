"""What a kernel could reach at best on a TPU, in cycles of its own program."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.planner import bundles

NAME, ROWS, INNER, STEPS = "calibration", 512, 2048, 8
COLUMNS = 128, 256, 512  # of which one suits the matrix units best


class Peak(NamedTuple):
    """Of one core of a device, a cycle; a cycle is what a bundle takes when full matrix units run at the chip's peak."""

    flops: float
    bytes: float
    cores: int
    ghz: float

    def roofline(self, flops: float, moved: float) -> float:
        """Cycles of a device for so much work, at best."""
        return max(flops / self.flops, moved / self.bytes) / self.cores


def calibration(columns: int) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """A plain product of known size, whose bundles say how much the compiler counts on from a full set of matrix units."""

    def kernel(x: Any, w: Any, y: Any) -> None:
        y[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32).astype(y.dtype)

    def run(x: Any, w: Any) -> Any:
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((STEPS * ROWS, columns), jnp.bfloat16),
            grid=(STEPS,),
            in_specs=[pl.BlockSpec((ROWS, INNER), lambda i: (i, 0)), pl.BlockSpec((INNER, columns), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((ROWS, columns), lambda i: (i, 0)),
            name=NAME,
        )(x, w)

    return run, tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((STEPS * ROWS, INNER), (INNER, columns)))


def flops_per_cycle(program: bundles.Program, columns: int) -> float:
    """Of the compiled `calibration`, were no slot of the matrix units empty. A lower bound: some slots load weights."""
    return 2 * ROWS * INNER * columns * program.capacity["MXU"] / program.grid.slots["MXU"]


def peak_of(flops: float, flops_per_second: float, bytes_per_second: float, cores: int) -> Peak:
    """From the best `flops_per_cycle`, and a core's rates."""
    clock = flops_per_second / flops
    return Peak(flops, bytes_per_second / clock, cores, clock / 1e9)


def of_device(flops: float) -> Peak:
    """Of the mesh around, with the rates that JAX has of its chip."""
    info = pltpu.get_tpu_info()
    return peak_of(flops, info.bf16_ops_per_second, info.mem_bw_bytes_per_second, info.num_cores)


def names_of(jaxpr: Any) -> set[str]:
    """Of the kernels in a traced program."""
    return {_name(equation) for equation in _equations(jaxpr) if equation.primitive.name == "pallas_call"}


def _name(equation: Any) -> str:
    return str(getattr(equation.params.get("name_and_src_info"), "name", equation.params.get("name", "")))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                    yield from _equations(inner)
