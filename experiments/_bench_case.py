"""What `bench_kernels` compiles: one kernel, for one shape, with what is known of how often its loops run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.grouped.cost import Cost

BF16 = jnp.dtype(jnp.bfloat16)


class Case(NamedTuple):
    kernel: str
    program: str  # the name that the compiled program bears
    shape: str
    run: Callable[..., Any]
    operands: tuple[jax.ShapeDtypeStruct, ...]
    cost: Cost | None = None  # None: the loops' trips are not counted
    blocks: tuple[Any, ...] = ()
    peer: str = ""  # what lines call it, if it is another's
    parts: bool = False  # `cost.trips` are those of parts, branches included, and not of loops alone
    small: tuple[int, ...] = ()  # as `bundles.Program.cycles_of_parts` has it, and so has
    copies: bool = False


def array(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
