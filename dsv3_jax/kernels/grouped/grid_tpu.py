"""How the grouped products' TPU kernels walk their grid, whose blocks are brought or copied by themselves, and a tile."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.tiles import LANES, MIB, SUBLANES_BF16


def call(
    kernel: Callable[..., None],
    grid: tuple[Any, ...],
    dimensions: Any,
    arrays: tuple[Sequence[jax.Array], Sequence[jax.Array], Sequence[jax.ShapeDtypeStruct]],
    blocks: tuple[Sequence[pl.BlockSpec], Sequence[pl.BlockSpec]],
    scratch: Sequence[Any],
    *,
    streamed: bool,
    vmem_mib: int,
    **how: Any,
) -> Sequence[jax.Array]:
    """`kernel` for each step of a grid, one of whose sides is traced.

    `arrays`: scalars that indices are made of, operands, results; `blocks`: of the latter two. `streamed`: where arrays are
    whole tiles the kernel copies its blocks, on one core. Into what it allocates it gets tiles of 16 rows of bfloat16, each a
    register; arrays, and blocks that are brought, have those of 8, two of which are put together whenever they are used.
    """
    (scalars, operands, results), (ins, outs) = arrays, blocks
    shapes = [v.shape[-2:] for v in operands] + [v.shape[-2:] for v in results]
    whole = all(tall % SUBLANES_BF16 == 0 and (wide == 1 or wide % LANES == 0) for tall, wide in shapes)
    vmem = vmem_mib * MIB
    if not (streamed and whole):
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=grid, in_specs=ins, out_specs=outs, scratch_shapes=scratch
        )
        params = pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=vmem)
        return pl.pallas_call(kernel, results, grid_spec=spec, compiler_params=params, **how)(*scalars, *operands)

    def stream(size: Any, *refs: Any) -> None:
        numbers, sources, targets, kept = cut(refs, len(scalars), len(ins), len(outs))

        def bound(spec: pl.BlockSpec) -> pl.BlockSpec:
            place: Any = spec.index_map
            return pl.BlockSpec(spec.block_shape, lambda *at: place(*at, *numbers))

        steps = pltpu.emit_pipeline(
            lambda *blocks: kernel(*numbers, *blocks, *kept),
            grid=tuple(side if isinstance(side, int) else size[0] for side in grid),
            in_specs=[bound(spec) for spec in ins],
            out_specs=[bound(spec) for spec in outs],
        )
        steps(*sources, *targets)

    (size,) = (side for side in grid if not isinstance(side, int))
    number, array = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        stream,
        results,
        in_specs=[number] * (1 + len(scalars)) + [array] * len(ins),
        out_specs=[array] * len(outs),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem),
        **how,
    )(size[None], *scalars, *operands)


def cut(refs: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """In parts of these sizes, and the rest."""
    ends = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    return [*(refs[a:b] for a, b in zip(ends, ends[1:], strict=False)), refs[ends[-1] :]]


class Place(NamedTuple):
    """Where a part of a tile is: its first row, how many it has, and which of the block's columns."""

    row: Any
    height: int
    column: Any


def walk(first: Any, end: Any, heights: Sequence[int], times: int, body: Callable[[Place], None]) -> None:
    """`body` so many times for each part of the rows from first to end, if any, in as few and as high parts as will do."""
    least = heights[-1]
    row = lax.div(first, least) * least
    end = jnp.where(first < end, end, row)
    for height in heights:
        parts = lax.div(end - row + least - 1, height)

        def run(i: Any, _: None, row: Any = row, height: int = height) -> None:
            body(Place(pl.multiple_of(row + lax.div(i, times) * height, least), height, lax.rem(i, times)))

        lax.fori_loop(0, parts * times, run, None)
        row = row + parts * height


def when(condition: Any, body: Callable[[Any, None], None]) -> None:
    """As a loop of one turn at most: a program's loops are counted apart, branches are not."""
    lax.fori_loop(0, condition.astype(jnp.int32), body, None)
