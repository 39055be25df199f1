"""Compiles kernels for a TPU that is not here; run as a program of its own, with libtpu: CHIP, then words of cases.

grouped:R:D:F:E:DTYPE            experts with their gradients
attention:T:H:C:R:W:DTYPE        attention with its gradients
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.kernels.grouped.api import grouped_swiglu
from dsv3_jax.planner.targets import topology


def grouped(rows, wide, hidden, experts, dtype):
    shapes = (rows, wide), (rows,), (experts, wide, hidden), (experts, wide, hidden), (experts, hidden, wide)
    dtypes = dtype, jnp.float32, dtype, dtype, dtype

    def run(*operands):
        count = jnp.full((experts,), rows // experts, jnp.int32)
        return grouped_swiglu(*operands, count, implementation="pallas_tpu")

    return run, list(zip(shapes, dtypes, strict=True))


def attention(length, heads, content, rotary, value, dtype):
    shapes = [(1, heads, length, content), (1, heads, length, rotary), (1, heads, length, content), (1, length, rotary)]
    shapes.append((1, heads, length, value))

    def run(*operands):
        return mla_attention(*operands, None, 0.1, implementation="pallas_tpu")

    return run, [(shape, dtype) for shape in shapes]


def main(chip, *cases):
    mesh = Mesh([topology(chip).devices[0]], ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())
    for case in cases:
        kind, *sizes, dtype = case.split(":")
        run, operands = {"grouped": grouped, "attention": attention}[kind](*map(int, sizes), jnp.dtype(dtype))
        shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in operands]

        def with_gradients(*operands, run=run):
            result, pull_back = jax.vjp(run, *operands)
            return result, pull_back(result)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            jax.jit(with_gradients).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
        print("compiled", case, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
