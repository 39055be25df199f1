"""The routed experts in FP8, forward and backward [§3.3]: the same function as `moe.experts`, its six products quantised.

Rows are sorted by expert, each one's beginning at a multiple of the block (the rows between are zeros), so that no tile along
the rows, which Wgrad needs, holds rows of two experts. A token is rounded before it is copied to its rows: what is copied, or
sent to another rank, is FP8. Between forward and backward pass are kept: the tokens, and SwiGLU's inputs, in FP8.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax import remat
from dsv3_jax.bits import to_bits
from dsv3_jax.config import PALLAS, Fp8Recipe, ModelConfig
from dsv3_jax.fp8.accumulate import product
from dsv3_jax.fp8.delayed import Amax, largest, magnitude, observed, parted
from dsv3_jax.fp8.linear import Products, keep, packed, rounded_weight
from dsv3_jax.fp8.precision import products, swiglu_cache
from dsv3_jax.fp8.quantize import Quantised, Quantiser, quantise
from dsv3_jax.kernels.modes import chosen
from dsv3_jax.kernels.quantise.api import swiglu_quantise
from dsv3_jax.kernels.scaled.api import grouped_scaled_outer, grouped_scaled_product
from dsv3_jax.model.layers import silu_times
from dsv3_jax.moe.dispatch import Plan, make_plan, sum_rows, take_rows
from dsv3_jax.parallel.collectives import varying_like

Weights = tuple[Any, ...]  # gate and up [E, D, F], down [E, F, D]
Histories = tuple[Any, ...]  # of delayed scaling, for each of the three; or None
SHORTEST_BLOCK = 64
KERNELS = get_args(PALLAS)  # dsv3_jax.kernels: scaled, quantise
IMPLEMENTATIONS = ("bucketed", "ragged_dot", *KERNELS)


class How(NamedTuple):
    """The products of gate and up, those of down, how SwiGLU's inputs are kept (None: in x's dtype), and the implementation."""

    up: Products
    down: Products
    cache: Quantiser | None
    implementation: str  # one of IMPLEMENTATIONS

    @property
    def block(self) -> int:
        """Rows that a step of the walk handles: whole tiles, and whole intervals between promotions of Wgrad's sums."""
        sides = [self.up.x_wgrad.tile[0], self.up.gradient_wgrad.tile[0], self.up.gradient.tile[0]]
        if self.up.accumulation.fidelity == "promoted":
            sides.append(self.up.accumulation.interval)
        side = math.lcm(*(side or 1 for side in sides))
        return side * -(-SHORTEST_BLOCK // side)


class Rows(NamedTuple):
    """Where the rows lie. X: aligned rows, R and at most `block` - 1 more an expert."""

    source_X: Array  # the flat choice n * K + k of each row; R where there is none
    row_NK: Array  # the row of each token's k-th choice; their number where it is of no expert
    count_E: Array  # aligned: multiples of the block


def _rows(plan: Plan, block: int) -> Rows:
    n_rows, n_experts = plan.choice_R.shape[0], plan.count_E.shape[0]
    size = -(-(n_rows + min(n_experts, n_rows) * (block - 1)) // block) * block
    count_E = -(-plan.count_E // block) * block
    first_E = jnp.cumsum(count_E, dtype=jnp.int32) - count_E
    expert_R = jnp.searchsorted(plan.start_E + plan.count_E, jnp.arange(n_rows, dtype=jnp.int32), side="right")
    shift_E = jnp.append(first_E - plan.start_E, size)  # rows of no expert fall off the end
    place_R = jnp.minimum(jnp.arange(n_rows, dtype=jnp.int32) + shift_E[expert_R], size).astype(jnp.int32)
    source_X = jnp.full(size, n_rows, jnp.int32).at[place_R].set(plan.choice_R, mode="drop")
    return Rows(source_X, jnp.append(place_R, 0)[plan.row_NK], count_E)


def chosen_fp8_implementation(name: str, platform: str, recipe: Fp8Recipe) -> str:
    """`name`, or what "auto" stands for on cpu, tpu or gpu."""
    otherwise = "bucketed" if platform == "cpu" or recipe.accumulation != "float32" else "ragged_dot"
    return chosen(name, otherwise, platform, possible=recipe.fits_kernels)


def fp8_routed_experts(
    x_ND: Float[Array, "N D"],
    indices_NK: Int[Array, "N K"],
    gates_NK: Float[Array, "N K"],
    experts: Mapping[str, Any],
    *,
    config: ModelConfig,
    implementation: str = "auto",
) -> Float[Array, "N D"]:
    """As `moe.experts.routed_experts`, in the formats of `config.fp8`; the experts' gradients come in their own dtype.

    Experts that are `Quantised` (of a released checkpoint) are multiplied as they are, and have no gradient.
    Raises ValueError for an implementation that has no FP8, or not the recipe's accumulation.
    """
    up, down = products(config, "experts.up_proj"), products(config, "experts.down_proj")
    assert up is not None and down is not None, config.fp8
    assert config.fp8 is not None
    implementation = chosen_fp8_implementation(implementation, jax.default_backend(), config.fp8)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: FP8 has {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if up.accumulation.fidelity != "float32" and implementation == "ragged_dot":
        raise ValueError(f"implementation: ragged_dot accumulates in float32, got fp8 with {up.accumulation}; take bucketed")
    by = implementation if implementation in KERNELS else "xla"
    how = How(replace(up, implementation=by), replace(down, implementation=by), swiglu_cache(config), implementation)
    weights, histories = zip(*(parted(experts[name]) for name in ("gate_proj", "up_proj", "down_proj")), strict=True)
    inputs = x_ND, gates_NK, weights, histories
    plan = make_plan(indices_NK, weights[0].shape[0])
    return _experts(*varying_like(inputs, (*inputs, plan)), how)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _experts(x_ND: Array, gates_NK: Array, weights: Weights, histories: Histories, plan: Plan, how: How) -> Array:
    return _forward(x_ND, gates_NK, weights, histories, plan, how)[0]


def _forward(x_ND: Array, gates_NK: Array, weights: Weights, histories: Histories, plan: Plan, how: How) -> tuple[Array, Any]:
    before = tuple(map(largest, histories))
    rows = _rows(plan, how.block)
    grouped = partial(_grouped, rows=rows, how=how)
    x = packed(how.up.rounded(x_ND, how.up.x, before[0].x), how.up.x)
    gate, up, down = _rounded(weights, before, how)
    x_XD = _of_tokens(x, rows)
    g_XF, u_XF = (grouped(x_XD, weight, of=how.up) for weight in (gate, up))
    gates_X1 = _gates(gates_NK, rows)
    if how.down.in_kernels:
        a_XF = swiglu_quantise(g_XF, u_XF, how.down.x, gates_X1[:, 0], implementation=how.implementation)
    else:
        a_XF = quantise(silu_times(g_XF, u_XF) * gates_X1, how.down.x, before[2].x)
    y_XD = grouped(a_XF, down, of=how.down)
    kept = tuple(keep(v, how.cache) if how.cache else v.astype(x_ND.dtype) for v in (g_XF, u_XF))
    kept = remat.name(kept, remat.SWIGLU_INPUT)
    y_ND = _sum(y_XD, rows).astype(x_ND.dtype)
    amax_x = None if histories[0] is None else magnitude(x_ND)
    return y_ND, (x, gates_NK, weights, histories, amax_x, plan, kept)


def _backward(how: How, saved: Any, dy_ND: Array) -> Any:
    x, gates_NK, weights, histories, amax_x, plan, kept = saved
    before = tuple(map(largest, histories))
    rows = _rows(plan, how.block)
    grouped = partial(_grouped, rows=rows, how=how, transposed=True)
    outer, of_up, of_down = partial(_outer, rows=rows, how=how), how.up, how.down
    gate, up, down = _rounded(weights, before, how)
    gates_X1 = _gates(gates_NK, rows)

    dy = of_down.rounded(dy_ND, of_down.gradient, before[2].gradient)
    dy_XD = _of_tokens(packed(dy, of_down.gradient), rows)
    h_XF, pull_back = jax.vjp(silu_times, *(v.astype(jnp.float32) for v in kept))
    da_XF = grouped(dy_XD, down, of=of_down)
    dgates_X = jnp.sum(da_XF * h_XF, axis=1)
    dg_XF, du_XF = pull_back(da_XF * gates_X1)
    dg, du = (of_up.rounded(d, of_up.gradient, b.gradient) for d, b in zip((dg_XF, du_XF), before[:2], strict=True))
    dx_XD = grouped(dg, gate, of=of_up) + grouped(du, up, of=of_up)

    x_wgrad = of_up.rounded_along_rows(_of_tokens(x, rows), before[0].x)
    dg, du = (of_up.rounded(d, of_up.gradient_wgrad, b.gradient) for d, b in zip((dg_XF, du_XF), before[:2], strict=True))
    dgate, dup = (outer(x_wgrad, d, of=of_up) for d in (dg, du))
    a_XF = h_XF * gates_X1
    dy_wgrad = of_down.rounded(dy_XD.astype(jnp.float32), of_down.gradient_wgrad, before[2].gradient)
    ddown = outer(of_down.rounded_along_rows(a_XF, before[2].x), dy_wgrad, of=of_down)

    dx_ND = _sum(dx_XD, rows).astype(dy_ND.dtype)
    dgates_NK = jnp.append(dgates_X, 0)[rows.row_NK]
    dweights = tuple(d.astype(w.dtype) for d, w in zip((dgate, dup, ddown), weights, strict=True))
    operands = (amax_x, dg_XF), (amax_x, du_XF), (magnitude(a_XF), dy_ND)
    now = tuple(observed(h, x, w, dy) for h, w, (x, dy) in zip(histories, weights, operands, strict=True))
    return dx_ND, dgates_NK, dweights, now, None


_experts.defvjp(_forward, _backward)


def _rounded(weights: Weights, before: tuple[Amax, ...], how: How) -> tuple[Quantised, ...]:
    return tuple(rounded_weight(*one) for one in zip(weights, (how.up, how.up, how.down), before, strict=True))


def _of_tokens(x: Quantised, rows: Rows) -> Quantised:
    """Each row's copy of its token, in FP8; zeros where there is no row."""
    n_choices = rows.row_NK.size
    token_X = jnp.minimum(rows.source_X, n_choices - 1) // rows.row_NK.shape[1]
    is_row = (rows.source_X < n_choices)[:, None]
    values = jnp.where(is_row, take_rows(x.values, token_X), jnp.zeros((), x.values.dtype))
    if x.tile[0] == 1 or x.scale.shape[0] > 1:
        side = x.tile[0]
        scale = take_rows(x.scale, token_X // side)
        scale = jnp.where(is_row, scale, jnp.ones((), scale.dtype))
        return replace(x, values=values, scale=scale, sides=values.shape, tile=(1, x.tile[1]))
    return replace(x, values=values, sides=values.shape, tile=(0, x.tile[1]))


def _gates(gates_NK: Array, rows: Rows) -> Array:
    """The gate of each row, 0 where there is none: [X, 1]."""
    return jnp.append(gates_NK.reshape(-1), 0)[rows.source_X][:, None]


def _sum(rows_XD: Array, rows: Rows) -> Array:
    """Each token's rows, summed in float32; a choice of no expert takes the row of zeros after the last."""
    return sum_rows(jnp.pad(rows_XD, ((0, 1), (0, 0))), rows.row_NK)


def _grouped(a: Quantised, b: Quantised, *, of: Products, rows: Rows, how: How, transposed: bool = False) -> Array:
    """[X, I] times each row's own expert's of [E, I, O], or `transposed` [E, O, I], float32."""
    accumulation = of.accumulation
    if of.in_kernels:
        options = {"dtype": jnp.float32, "implementation": of.implementation}
        return grouped_scaled_product(a, b, rows.count_E, transposed=transposed, **options)
    b = b.T if transposed else b
    if accumulation.fidelity == "float32":
        wide = a.astype(jnp.float32), b.astype(jnp.float32)
        if how.implementation == "ragged_dot":
            return lax.ragged_dot(*wide, rows.count_E, precision="highest", preferred_element_type=jnp.float32)
        # Experts that were stored in FP8 become numbers one by one, the others all at once.
        a, b = _plain(wide[0]), b if b.values.dtype != jnp.float32 else _plain(wide[1])

    def one_block(y_XO: Array, expert: Array, at: Array) -> Array:
        block = product(_block(a, at, how.block), _matrix(b, expert), accumulation)
        return lax.dynamic_update_slice_in_dim(y_XO, block, at, axis=0)

    zeros = jnp.zeros((a.values.shape[0], b.values.shape[-1]), jnp.float32)
    return _walk(rows, how.block, one_block, varying_like((a.values, b.values, rows.source_X), zeros))


def _outer(a: Quantised, b: Quantised, *, of: Products, rows: Rows, how: How) -> Array:
    """For each expert, the sum over its rows of [X, I]^T [X, O]: [E, I, O], float32. `a` as `rounded_along_rows` has it."""
    if of.in_kernels:
        return grouped_scaled_outer(a, b, rows.count_E, dtype=jnp.float32, implementation=of.implementation)
    accumulation, n_experts = of.accumulation, rows.count_E.shape[0]
    if accumulation.fidelity == "float32":
        wide = a.astype(jnp.float32), b.astype(jnp.float32)
        if how.implementation == "ragged_dot":
            return _ragged_outer(*wide, rows.count_E)
        a, b = (_plain(v) for v in wide)
    factor = jnp.ones((1, 1, 1), jnp.float32)
    if accumulation.carries and a.scale.size == b.scale.size == 1:  # one scale each: it follows when all is added up
        factor = (a.scale * b.scale)[None]
        a, b = (_plain(matrix.wide().values) for matrix in (a, b))

    def one_block(dw_EIO: Array, expert: Array, at: Array) -> Array:
        sum_IO = lax.dynamic_index_in_dim(dw_EIO, expert, keepdims=False)
        pair = _block(a, at, how.block).T, _block(b, at, how.block)
        if accumulation.carries:
            sum_IO = product(*pair, accumulation, start=sum_IO)
        else:
            sum_IO = sum_IO + product(*pair, accumulation)
        return lax.dynamic_update_index_in_dim(dw_EIO, sum_IO, expert, axis=0)

    zeros = jnp.zeros((n_experts, a.values.shape[-1], b.values.shape[-1]), jnp.float32)
    return factor * _walk(rows, how.block, one_block, varying_like((a.values, b.values, rows.source_X), zeros))


def _ragged_outer(a_XI: Array, b_XO: Array, count_E: Array) -> Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(
        a_XI, b_XO, count_E, ragged_dot_dimension_numbers=numbers, precision="highest", preferred_element_type=jnp.float32
    )


def _walk(rows: Rows, block: int, body: Callable[[Any, Array, Array], Any], carry: Any) -> Any:
    """`carry = body(carry, expert, first row)` for every block of every expert, in order."""
    end_E = jnp.cumsum(rows.count_E, dtype=jnp.int32)

    def step(i: Array, carry: Any) -> Any:
        at = i * block
        return body(carry, jnp.searchsorted(end_E, at, side="right").astype(jnp.int32), at)

    return lax.fori_loop(jnp.int32(0), end_E[-1] // block, step, carry)


def _plain(numbers: Array) -> Quantised:
    """Numbers as a matrix with a scale of 1."""
    one = varying_like(numbers, jnp.ones((*numbers.shape[:-2], 1, 1), jnp.float32))
    return Quantised(numbers, one, numbers.shape[-2:], (0, 0))


def _block(matrix: Quantised, at: Array, block: int) -> Quantised:
    """Rows at ... at + block."""
    values = lax.dynamic_slice_in_dim(matrix.values, at, block, axis=0)
    scale, side = matrix.scale, matrix.tile[0]
    if side:
        scale = lax.dynamic_slice_in_dim(scale, at // side, block // side, axis=0)
    return replace(matrix, values=values, scale=scale, sides=values.shape)


def _matrix(stack: Quantised, expert: Array) -> Quantised:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(to_bits(a), expert, keepdims=False), stack)
