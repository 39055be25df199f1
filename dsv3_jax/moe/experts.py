"""The routed experts of DeepSeekMoE, the sum of eq. 12 [§2.1.2], forward and backward.

y_n = sum_k gates[n, k] * down(silu(gate(x_n)) * up(x_n)), the projections being those of expert indices[n, k]. The gate is
applied before the down projection, which is linear: combining is then a plain sum, and a gate's gradient a row's dot product.
Implementations of the same function:

* `bucketed`: rows sorted into one bucket for each expert, exactly as long as the expert's load, walked in short blocks.
* `pallas_tpu`, `pallas_gpu`: the same order of rows, and our own kernels (`dsv3_jax.kernels.grouped`) for the products.
* `ragged_dot`: the same, with XLA's `jax.lax.ragged_dot`. Correct but slow on CPU.
* `dense`: every expert on every token. For reading and for tests.

Why a walk and not one batched product over equal buckets: the walk's work is the routed rows, whatever the load, with nothing
padded to a capacity and nothing beyond it to treat apart. An expert's weights are sliced out once for all its rows, and a
block's intermediates never leave the cache. As in the report [§3.2.3], the SwiGLU's inputs are saved and its output recomputed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax import remat
from dsv3_jax.bits import from_bits, to_bits
from dsv3_jax.config import PALLAS
from dsv3_jax.kernels.grouped.api import grouped_swiglu
from dsv3_jax.kernels.modes import chosen
from dsv3_jax.moe.dispatch import Plan, combine, dispatch, make_plan, sum_rows, take_rows
from dsv3_jax.parallel.collectives import varying_like
from dsv3_jax.weights import is_stored

# gate and up [E, D, F], down [E, F, D]: arrays, stored weights, or each a tuple of E matrices
Weights = tuple[Any, ...]

# Rows that one step of the walk handles. The last block of an expert is partly wasted; shorter ones make slower products.
BLOCK = 64


def chosen_implementation(name: str, platform: str) -> str:
    """`name`, or what "auto" stands for on cpu, tpu or gpu."""
    return chosen(name, "bucketed" if platform == "cpu" else "ragged_dot", platform)


def routed_experts(
    x_ND: Float[Array, "N D"],
    indices_NK: Int[Array, "N K"],
    gates_NK: Float[Array, "N K"],
    experts: Mapping[str, Any],
    *,
    implementation: str = "auto",
) -> Float[Array, "N D"]:
    """The gated sum of each token's K experts, eq. 12; differentiable in x, gates and experts.

    x_ND and the experts (`gate_proj`, `up_proj` [E, D, F], `down_proj` [E, F, D]) share one compute dtype, float32 or bfloat16;
    gates are float32; indices int32 in [0, E], distinct within a token, where E stands for no expert. Without differentiation
    experts may also be stored in few bits (`dsv3_jax.weights`), or be tuples of E matrices (`gate_proj+up_proj`: side by side).
    Products and the sum over k accumulate in float32, the result has x's dtype. `implementation`: one of the above (Pallas:
    also as `kernels.modes` has it), or "auto", the default device's.

    Raises ValueError for an unknown implementation or dtypes that differ from these.
    """
    implementation = chosen_implementation(implementation, jax.default_backend())
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {('auto', *_IMPLEMENTATIONS)}, got {implementation!r}")
    if isinstance(experts["down_proj"], tuple):
        weights: Weights = tuple(experts[name] for name in (*sorted(set(experts) - {"down_proj"}), "down_proj"))
        if implementation != "bucketed":
            raise ValueError(f"implementation: experts by themselves need bucketed, got {implementation!r}; stack them")
        return _walk(x_ND, gates_NK, weights, make_plan(indices_NK, len(weights[0])))
    weights = (experts["gate_proj"], experts["up_proj"], experts["down_proj"])
    if any(w.dtype != x_ND.dtype and not is_stored(w) for w in weights):
        raise ValueError(f"experts: expected the dtype of x, {x_ND.dtype}, got {[str(w.dtype) for w in weights]}; cast them")
    if gates_NK.dtype != jnp.float32:
        raise ValueError(f"gates: expected float32, got {gates_NK.dtype}")
    # As varying over whatever one of them varies over, so that JAX sums a replicated one's gradient over the mesh: here, where
    # that sum is of N rows and not of R, and before `custom_vjp`, which knows nothing of it.
    inputs = x_ND, gates_NK, weights
    x_ND, gates_NK, weights = varying_like(inputs, inputs)
    return _IMPLEMENTATIONS[implementation](x_ND, indices_NK, gates_NK, weights)


def _dense(x_ND: Array, indices_NK: Array, gates_NK: Array, weights: Weights) -> Array:
    gate, up, down = (w.astype(x_ND.dtype) for w in weights)
    chosen_NKE = indices_NK[:, :, None] == jnp.arange(gate.shape[0], dtype=indices_NK.dtype)[None, None, :]
    coefficient_NE = jnp.sum(jnp.where(chosen_NKE, gates_NK[:, :, None], 0.0), axis=1)
    g_ENF, u_ENF = (jnp.einsum("nd,edf->enf", x_ND, w, preferred_element_type=jnp.float32) for w in (gate, up))
    a_ENF = (jax.nn.silu(g_ENF) * u_ENF * coefficient_NE.T[:, :, None]).astype(x_ND.dtype)
    return jnp.einsum("enf,efd->nd", a_ENF, down, preferred_element_type=jnp.float32).astype(x_ND.dtype)


def _ragged_dot(x_ND: Array, indices_NK: Array, gates_NK: Array, weights: Weights) -> Array:
    gate, up, down = (w.astype(x_ND.dtype) for w in weights)
    plan = make_plan(indices_NK, gate.shape[0])
    x_RD = dispatch(x_ND, plan)
    gates_R1 = dispatch(gates_NK.reshape(-1, 1), plan._replace(row_NK=plan.row_NK.reshape(-1, 1)))
    products = (lax.ragged_dot(x_RD, w, plan.count_E, preferred_element_type=jnp.float32) for w in (gate, up))
    g_RF, u_RF = (remat.name(product, remat.SWIGLU_INPUT) for product in products)
    a_RF = (jax.nn.silu(g_RF) * u_RF * gates_R1).astype(x_ND.dtype)
    y_RD = lax.ragged_dot(a_RF, down, plan.count_E, preferred_element_type=jnp.float32)
    return combine(y_RD.astype(x_ND.dtype), plan)


def _kernels(name: str, x_ND: Array, indices_NK: Array, gates_NK: Array, weights: Weights) -> Array:
    gate, up, down = (w.astype(x_ND.dtype) for w in weights)
    plan = varying_like(weights, make_plan(indices_NK, gate.shape[0]))
    gates_R1 = dispatch(gates_NK.reshape(-1, 1), plan._replace(row_NK=plan.row_NK.reshape(-1, 1)))
    y_RD = grouped_swiglu(dispatch(x_ND, plan), gates_R1[:, 0], gate, up, down, plan.count_E, implementation=name)
    return combine(y_RD, plan)


def _bucketed(x_ND: Array, indices_NK: Array, gates_NK: Array, weights: Weights) -> Array:
    return _walk(x_ND, gates_NK, weights, varying_like(weights, make_plan(indices_NK, weights[0].shape[0])))


_IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, Weights], Array]] = {
    "bucketed": _bucketed,
    "ragged_dot": _ragged_dot,
    "dense": _dense,
    **{name: partial(_kernels, name) for name in get_args(PALLAS)},
}


# The walk. Blocks start at multiples of BLOCK from the expert's first row, so an expert's last block reaches into the rows of
# the experts after it. Forward writes are simply overwritten when those experts' turn comes; what sums over rows (the weights'
# gradients) selects the expert's own rows first, on both sides of the product, since 0 * NaN is NaN. Row buffers are BLOCK
# rows longer than R, for the last block of all; what the loops slice and update they hold as bits (see `to_bits`).


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _slice(rows: Array, start: Array) -> Array:
    return lax.dynamic_slice_in_dim(rows, start, BLOCK, axis=0)


def _write(rows: Array, block: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(rows, to_bits(block), start, axis=0)


def _weights_of(expert: Array, weight_bits: Weights, weights: Weights, dtype: jnp.dtype) -> list[Array]:
    """One expert's three matrices in `dtype`; `weights` says what the bits are."""
    if isinstance(weights[0], tuple):
        return list(lax.switch(expert, [partial(_three_of, own, dtype) for own in zip(*weights, strict=True)]))

    def own(bits: Array, like: Array) -> Array:
        return from_bits(lax.dynamic_index_in_dim(bits, expert, keepdims=False), like.dtype)

    return [w.astype(dtype) for w in jax.tree.map(own, weight_bits, weights)]


def _sides(down: Any) -> tuple[int, int]:
    """Width and hidden size of the experts, stacked or not."""
    return (down[0] if isinstance(down, tuple) else down).shape[-2:]


def _three_of(weights: Any, dtype: jnp.dtype) -> Any:
    """Gate, up and down of one expert by itself."""
    *gate_up, down = (w.astype(dtype) for w in weights)
    return (*(jnp.split(gate_up[0], 2, axis=-1) if len(gate_up) == 1 else gate_up), down)


def _row_inputs(gates_NK: Array, plan: Plan) -> tuple[Array, Array]:
    """Token and gate of every row, and of BLOCK rows more."""
    token_R = jnp.pad(plan.token_R, (0, BLOCK))
    gates_R = jnp.pad(gates_NK.reshape(-1)[plan.choice_R], (0, BLOCK))
    return token_R, gates_R


def _for_each_expert(plan: Plan, body: Callable, carry):
    """`carry = body(expert, start, count, carry)` for the experts that have rows, in order: the others cost nothing."""
    order_E = jnp.argsort(plan.count_E == 0, stable=True)
    active = jnp.sum(plan.count_E > 0, dtype=jnp.int32)

    def step(i, carry):
        expert = order_E[i]
        return body(expert, plan.start_E[expert], plan.count_E[expert], carry)

    return lax.fori_loop(jnp.int32(0), active, step, carry)


def _for_each_block(count: Array, body: Callable, carry):
    """`carry = body(offset, carry)` for offsets 0, BLOCK, 2 * BLOCK, ... below count."""
    return lax.fori_loop(jnp.int32(0), (count + BLOCK - 1) // BLOCK, lambda b, carry: body(b * BLOCK, carry), carry)


def _walk_forward(x_ND: Array, gates_NK: Array, weights: Weights, plan: Plan):
    """-> y [N, D], and what the backward pass needs: the inputs, and both pre-activations of every row in x's dtype."""
    token_R, gates_R = _row_inputs(gates_NK, plan)
    rows, (width, hidden), dtype = token_R.shape[0], _sides(weights[-1]), x_ND.dtype
    weight_bits = jax.tree.map(to_bits, weights)

    def expert_step(expert, start, count, carry):
        gate, up, down = _weights_of(expert, weight_bits, weights, dtype)

        def block_step(offset, carry):
            y_RD, g_RF, u_RF = carry
            at = start + offset
            x = take_rows(x_ND, _slice(token_R, at))
            g, u = _product("rd,df->rf", x, gate), _product("rd,df->rf", x, up)
            a = (jax.nn.silu(g) * u * _slice(gates_R, at)[:, None]).astype(dtype)
            blocks = (v.astype(dtype) for v in (_product("rf,fd->rd", a, down), g, u))
            return tuple(_write(v, block, at) for v, block in zip((y_RD, g_RF, u_RF), blocks, strict=True))

        return _for_each_block(count, block_step, carry)

    buffers = tuple(to_bits(jnp.zeros((rows, size), dtype)) for size in (hidden, width, width))
    y_RD, g_RF, u_RF = _for_each_expert(plan, expert_step, varying_like([token_R], buffers))
    g_RF, u_RF = (remat.name(v, remat.SWIGLU_INPUT) for v in (g_RF, u_RF))
    return sum_rows(from_bits(y_RD, dtype), plan.row_NK).astype(dtype), (x_ND, gates_NK, weights, plan, g_RF, u_RF)


def _walk_backward(saved, dy_ND: Array):
    x_ND, gates_NK, weights, plan, g_RF, u_RF = saved
    token_R, gates_R = _row_inputs(gates_NK, plan)
    rows, (width, hidden), dtype = token_R.shape[0], weights[2].shape[1:], x_ND.dtype
    weight_bits = jax.tree.map(to_bits, weights)

    def expert_step(expert, start, count, carry):
        dx_RD, dgates_R, dweights = carry
        gate, up, down = _weights_of(expert, weight_bits, weights, dtype)

        def block_step(offset, carry):
            dx_RD, dgates_R, (dgate_FD, dup_FD, ddown_FD) = carry
            at = start + offset
            own = (offset + jnp.arange(BLOCK, dtype=jnp.int32) < count)[:, None]
            token, scale = _slice(token_R, at), jnp.where(own, _slice(gates_R, at)[:, None], 0)
            x, dy = (jnp.where(own, take_rows(v, token), 0) for v in (x_ND, dy_ND))
            g, u = (jnp.where(own, from_bits(_slice(v, at), dtype), 0).astype(jnp.float32) for v in (g_RF, u_RF))
            sigmoid = jax.nn.sigmoid(g)
            silu = g * sigmoid
            h = silu * u
            dh = _product("rd,fd->rf", dy, down)
            da = dh * scale
            du = (da * silu).astype(dtype)
            dg = (da * u * (sigmoid + silu * (1 - sigmoid))).astype(dtype)
            a = (h * scale).astype(dtype)
            dx = (_product("rf,df->rd", dg, gate) + _product("rf,df->rd", du, up)).astype(dtype)
            dweights = (
                # [F, D] and not [D, F]: on CPU a product with the longer axis last is a third faster.
                dgate_FD + _product("rf,rd->fd", dg, x),
                dup_FD + _product("rf,rd->fd", du, x),
                ddown_FD + _product("rf,rd->fd", a, dy),
            )
            return _write(dx_RD, dx, at), _write(dgates_R, jnp.sum(dh * h, axis=1), at), dweights

        zeros = varying_like([token_R], (jnp.zeros((width, hidden), jnp.float32),) * 3)
        dx_RD, dgates_R, (dgate_FD, dup_FD, ddown_FD) = _for_each_block(count, block_step, (dx_RD, dgates_R, zeros))
        new = (w[None].astype(dtype) for w in (dgate_FD.T, dup_FD.T, ddown_FD))
        return dx_RD, dgates_R, tuple(_write(dw, w, expert) for dw, w in zip(dweights, new, strict=True))

    dx_bits = to_bits(jnp.zeros((rows, hidden), dtype))
    zeros = dx_bits, jnp.zeros(rows, jnp.float32), jax.tree.map(jnp.zeros_like, weight_bits)
    dx_RD, dgates_R, dweights = _for_each_expert(plan, expert_step, varying_like([token_R], zeros))
    dx_ND = sum_rows(from_bits(dx_RD, dtype), plan.row_NK).astype(dtype)
    return dx_ND, dgates_R[plan.row_NK], jax.tree.map(lambda w: from_bits(w, dtype), dweights), None


@jax.custom_vjp
def _walk(x_ND: Array, gates_NK: Array, weights: Weights, plan: Plan) -> Array:
    return _walk_forward(x_ND, gates_NK, weights, plan)[0]


_walk.defvjp(_walk_forward, _walk_backward)
