"""Products of rows that are sorted by group, each with its own group's matrix: the experts' [§2.1.2, §3.3].

    y = grouped_product(x, w, count)                      y_r = x_r W_group(r)
    y = grouped_swiglu(x, gates, gate, up, down, count)   y_r = (gates_r * silu(x_r G) * (x_r U)) D

`count_E` says how many rows each group has, in order; a group may have none. Rows behind the last group's are of no group:
their results and gradients are zero, and whatever they hold, NaN included, reaches nothing else. Sums are float32.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import remat
from dsv3_jax.kernels.grouped import outer_tpu, pallas_gpu, pallas_tpu, reference, xla
from dsv3_jax.kernels.grouped.call import Out, OuterProducts, Products
from dsv3_jax.kernels.modes import Mode, mode_of


class Implementation(NamedTuple):
    products: Products
    outer_products: OuterProducts


IMPLEMENTATIONS = {
    "reference": Implementation(reference.products, reference.outer_products),
    "xla": Implementation(xla.products, xla.outer_products),
    "pallas_tpu": Implementation(pallas_tpu.products, outer_tpu.outer_products),
    "pallas_gpu": Implementation(pallas_gpu.products, pallas_gpu.outer_products),
}


def grouped_product(
    x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"], count_E: Int[Array, " E"], *, implementation: str
) -> Float[Array, "R O"]:
    """Each row times its group's matrix, in x's dtype; differentiable in both.

    Operands are both float32 or both bfloat16. `implementation`: one of IMPLEMENTATIONS; see `kernels.modes`.
    Raises ValueError for another one, for dtypes that differ, and for sides that do not fit each other.
    """
    mode = mode_of(implementation, tuple(IMPLEMENTATIONS))
    _check(x_RI, count_E, w_EIO=w_EIO)
    if w_EIO.shape[1] != x_RI.shape[1]:
        raise ValueError(f"w_EIO: expected [{count_E.shape[0]}, {x_RI.shape[1]}, O], got {list(w_EIO.shape)}")
    return _product(x_RI, w_EIO, count_E.astype(jnp.int32), mode)


def grouped_swiglu(
    x_RD: Float[Array, "R D"],
    gates_R: Float[Array, " R"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    count_E: Int[Array, " E"],
    *,
    implementation: str,
) -> Float[Array, "R D"]:
    """The experts of eq. 12, each row's result times its gate, in x's dtype; differentiable in all but `count_E`.

    Kept for the backward pass: the inputs and both pre-activations. Gates are float32, the others float32 or bfloat16, alike.
    `implementation` and errors: as in `grouped_product`.
    """
    mode = mode_of(implementation, tuple(IMPLEMENTATIONS))
    _check(x_RD, count_E, gate_EDF=gate_EDF, up_EDF=up_EDF, down_EFD=down_EFD)
    if gates_R.dtype != jnp.float32 or gates_R.shape != x_RD.shape[:1]:
        raise ValueError(f"gates_R: expected float32 [{x_RD.shape[0]}], got {gates_R.dtype} {list(gates_R.shape)}")
    side, width = x_RD.shape[1], gate_EDF.shape[2]
    if gate_EDF.shape != up_EDF.shape or gate_EDF.shape[1] != side or down_EFD.shape[1:] != (width, side):
        shapes = [list(w.shape) for w in (gate_EDF, up_EDF, down_EFD)]
        raise ValueError(f"experts: expected [E, {side}, F] twice and [E, F, {side}], got {shapes}")
    return _swiglu(x_RD, gates_R, gate_EDF, up_EDF, down_EFD, count_E.astype(jnp.int32), mode)


def _check(x: Array, count_E: Array, **weights: Array) -> None:
    for name, w in weights.items():
        if w.dtype != x.dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name}: expected x's dtype, float32 or bfloat16, got {w.dtype} and x {x.dtype}; cast them")
        if w.shape[0] != count_E.shape[0]:
            raise ValueError(f"{name}: expected as many matrices as groups, {count_E.shape[0]}, got {w.shape[0]}")


def _first(products: Any, extras: Any) -> Any:
    return products


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x_RI: Array, w_EIO: Array, count_E: Array, mode: Mode) -> Array:
    return _one(mode, x_RI, w_EIO, count_E, x_RI.dtype)


def _one(
    mode: Mode, x: Array, w: Array, count_E: Array, dtype: Any, *, transposed: bool = False, plus: Array | None = None
) -> Array:
    """x times w, plus what there is already."""
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[1 if transposed else 2]), dtype)
    extras, epilogue = ([], _first) if plus is None else ([plus], lambda products, extras: [products[0] + extras[0]])
    run = IMPLEMENTATIONS[mode.implementation].products
    name = "grouped_product_transposed" if transposed else "grouped_product"
    return run(
        x, [w], extras, count_E, [Out(dtype)], epilogue, transposed=transposed, name=name, interpret=mode.interpret
    )[0]  # fmt: skip


def _outer(mode: Mode, x: Array, y: Array, count_E: Array, dtype: Any) -> Array:
    if x.shape[0] == 0:
        return jnp.zeros((count_E.shape[0], x.shape[1], y.shape[1]), dtype)
    run = IMPLEMENTATIONS[mode.implementation].outer_products
    return run(x, y, count_E, dtype=dtype, name="grouped_outer", interpret=mode.interpret)


def _product_forward(x: Array, w: Array, count_E: Array, mode: Mode) -> tuple[Array, Any]:
    return _product(x, w, count_E, mode), (x, w, count_E)


def _product_backward(mode: Mode, saved: Any, dy: Array) -> tuple[Array, Array, None]:
    x, w, count_E = saved
    return _one(mode, dy, w, count_E, x.dtype, transposed=True), _outer(mode, x, dy, count_E, w.dtype), None


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _swiglu(x: Array, gates_R: Array, gate: Array, up: Array, down: Array, count_E: Array, mode: Mode) -> Array:
    return _swiglu_forward(x, gates_R, gate, up, down, count_E, mode)[0]


def _swiglu_forward(
    x: Array, gates_R: Array, gate: Array, up: Array, down: Array, count_E: Array, mode: Mode
) -> tuple[Array, Any]:
    def epilogue(products: Any, extras: Any) -> Any:
        (g, u), (gates,) = products, extras
        return g, u, jax.nn.silu(g) * u * gates

    if x.shape[0] == 0:
        return x, (x, gates_R, gate, up, down, count_E, *(jnp.zeros((0, gate.shape[2]), x.dtype),) * 2)
    run = IMPLEMENTATIONS[mode.implementation].products
    g, u, a = run(
        x, [gate, up], [gates_R[:, None]], count_E, [Out(x.dtype)] * 3, epilogue,
        transposed=False, name="grouped_swiglu", interpret=mode.interpret,
    )  # fmt: skip
    g, u = (remat.name(v, remat.SWIGLU_INPUT) for v in (g, u))
    return _one(mode, a, down, count_E, x.dtype), (x, gates_R, gate, up, down, count_E, g, u)


def _swiglu_backward(mode: Mode, saved: Any, dy: Array) -> Any:
    x, gates_R, gate, up, down, count_E, g, u = saved

    def epilogue(products: Any, extras: Any) -> Any:
        (dh,), (g, u, gates) = products, extras
        sigmoid = jax.nn.sigmoid(g)
        silu = g * sigmoid
        da = dh * gates
        return da * u * (sigmoid + silu * (1 - sigmoid)), da * silu, silu * u * gates, dh * silu * u

    if x.shape[0] == 0:
        return (*(jnp.zeros_like(v) for v in (x, gates_R, gate, up, down)), None)
    run, kind = IMPLEMENTATIONS[mode.implementation].products, x.dtype
    outs = [Out(kind), Out(kind), Out(kind), Out(jnp.float32, partial=True)]
    dg, du, a, dgates = run(
        dy, [down], [g, u, gates_R[:, None]], count_E, outs, epilogue,
        transposed=True, name="grouped_swiglu_backward", interpret=mode.interpret,
    )  # fmt: skip
    dx = _one(mode, dg, gate, count_E, jnp.float32, transposed=True)
    dx = _one(mode, du, up, count_E, kind, transposed=True, plus=dx)
    dgate, dup = (_outer(mode, x, d, count_E, gate.dtype) for d in (dg, du))
    return dx, dgates.sum(axis=1), dgate, dup, _outer(mode, a, dy, count_E, down.dtype), None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
