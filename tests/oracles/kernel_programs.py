"""Compiles kernels for a TPU that is not here; run as a program of its own, with libtpu: CHIP, then words of cases.

grouped:R:D:F:E:DTYPE            experts with their gradients
attention:T:H:C:R:W:DTYPE        attention with its gradients
scaled:R:I:O:E:DTYPE             FP8 products: rows with matrices, with their transposes, and the gradient of weights
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.fp8.quantize import Quantised
from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.kernels.grouped.api import grouped_swiglu
from dsv3_jax.kernels.scaled.api import grouped_scaled_outer, grouped_scaled_product
from dsv3_jax.planner.targets import topology


def grouped(rows, wide, hidden, experts, dtype):
    shapes = (rows, wide), (rows,), (experts, wide, hidden), (experts, wide, hidden), (experts, hidden, wide)
    dtypes = dtype, jnp.float32, dtype, dtype, dtype

    def run(*operands):
        count = jnp.full((experts,), rows // experts, jnp.int32)
        return grouped_swiglu(*operands, count, implementation="pallas_tpu")

    return with_gradients(run), list(zip(shapes, dtypes, strict=True))


def attention(length, heads, content, rotary, value, dtype):
    shapes = [(1, heads, length, content), (1, heads, length, rotary), (1, heads, length, content), (1, length, rotary)]
    shapes.append((1, heads, length, value))

    def run(*operands):
        return mla_attention(*operands, None, 0.1, implementation="pallas_tpu")

    return with_gradients(run), [(shape, dtype) for shape in shapes]


def scaled(rows, inner, outer, experts, dtype):
    tiles = {"row": (1, 128), "column": (128, 1), "block": (128, 128)}
    shapes = [
        ((rows, inner), "row"), ((experts, inner, outer), "block"), ((experts, outer, inner), "block"),
        ((inner, rows), "row"), ((rows, outer), "column"),
    ]  # fmt: skip
    operands = []
    for shape, kind in shapes:
        across = [-(-size // side) for size, side in zip(shape[-2:], tiles[kind], strict=True)]
        operands += [(shape, jnp.float8_e4m3fn), ((*shape[:-2], *across), jnp.float32)]

    def run(*operands):
        x, w, w_transposed, x_along, y = (
            Quantised(values, scale, shape[-2:], tiles[kind])
            for values, scale, (shape, kind) in zip(operands[::2], operands[1::2], shapes, strict=True)
        )
        count, how = jnp.full((experts,), rows // experts, jnp.int32), {"dtype": dtype, "implementation": "pallas_tpu"}
        return (
            grouped_scaled_product(x, w, count, **how),
            grouped_scaled_product(x, w_transposed, count, transposed=True, **how),
            grouped_scaled_outer(x_along, y, count, **how),
        )

    return run, operands


def with_gradients(run):
    def both(*operands):
        result, pull_back = jax.vjp(run, *operands)
        return result, pull_back(result)

    return both


KINDS = {"grouped": grouped, "attention": attention, "scaled": scaled}


def main(chip, *cases):
    mesh = Mesh([topology(chip).devices[0]], ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())
    for case in cases:
        kind, *sizes, dtype = case.split(":")
        run, operands = KINDS[kind](*map(int, sizes), jnp.dtype(dtype))
        shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in operands]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
        print("compiled", case, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
