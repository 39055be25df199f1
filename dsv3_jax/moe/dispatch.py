"""Dispatch and combine, eq. 12 [§2.1.2]: tokens' rows ordered by expert, and back. Gathers only, so equal bits every time.

A *row* is one (token, chosen expert) pair; there are R = N * K of them, and none is ever dropped. Rows are ordered by expert
and, within an expert, by token. `dispatch` and `combine` are linear and each other's transposes, which is how they are
differentiated: left to itself, JAX would turn a gather's gradient into a scatter-add of float rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from dsv3_jax.bits import from_bits, to_bits

IN_BOUNDS = "promise_in_bounds"  # our own indices are; clamping them costs a fifth of a gather on CPU


class Plan(NamedTuple):
    """Who goes where. `choice_R` and `row_NK` are inverse permutations of each other; all int32."""

    choice_R: Int[Array, " R"]  # the flat index n * K + k that each row came from
    row_NK: Int[Array, "N K"]  # the row of each token's k-th choice
    start_E: Int[Array, " E"]  # the first row of each expert
    count_E: Int[Array, " E"]  # the number of rows of each expert

    @property
    def token_R(self) -> Int[Array, " R"]:
        """The token of each row."""
        return self.choice_R // self.row_NK.shape[1]


def make_plan(indices_NK: Int[Array, "N K"], n_experts: int) -> Plan:
    """Orders the choices by expert. `indices_NK` in [0, n_experts]; a token's K experts are distinct.

    Choices of n_experts stand for none: their rows come last and no expert counts them.
    """
    rows = indices_NK.size
    flat_R = indices_NK.reshape(rows).astype(jnp.int32)
    iota_R = jnp.arange(rows, dtype=jnp.int32)
    if (n_experts + 1) * rows < 2**31:
        # Expert and position in one key: on CPU five times faster than a stable sort of pairs, and the same order.
        choice_R = lax.sort(flat_R * rows + iota_R) % rows
    else:
        _, choice_R = lax.sort((flat_R, iota_R), num_keys=1, is_stable=True)
    row_R = jnp.zeros(rows, jnp.int32).at[choice_R].set(iota_R, unique_indices=True, mode=IN_BOUNDS)
    end_E = jnp.searchsorted(flat_R[choice_R], jnp.arange(n_experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    return Plan(choice_R, row_R.reshape(indices_NK.shape), start_E, end_E - start_E)


def take_rows(values: Shaped[Array, "M D"], index: Int[Array, " R"]) -> Shaped[Array, "R D"]:
    """values[index], for indices that are in bounds by construction."""
    return from_bits(to_bits(values).at[index].get(mode=IN_BOUNDS), values.dtype)


def sum_rows(rows_RD: Float[Array, "R D"], row_NK: Int[Array, "N K"]) -> Float[Array, "N D"]:
    """Each token's K rows, summed in float32 from k = 0 upwards."""
    # One gather for each k: XLA's CPU compiler fuses these into a single pass, but not a [N, K, D] gather with its sum.
    parts = [take_rows(rows_RD, row_N).astype(jnp.float32) for row_N in row_NK.T]
    return sum(parts[1:], start=parts[0])


@jax.custom_vjp
def dispatch(x_ND: Float[Array, "N D"], plan: Plan) -> Float[Array, "R D"]:
    """Each row's copy of its token, in the order of the experts."""
    return take_rows(x_ND, plan.token_R)


@jax.custom_vjp
def combine(rows_RD: Float[Array, "R D"], plan: Plan) -> Float[Array, "N D"]:
    """The sum of each token's K rows: accumulated in float32, returned in the rows' dtype."""
    return sum_rows(rows_RD, plan.row_NK).astype(rows_RD.dtype)


dispatch.defvjp(lambda x_ND, plan: (dispatch(x_ND, plan), plan), lambda plan, dy_RD: (combine(dy_RD, plan), None))
combine.defvjp(lambda rows_RD, plan: (combine(rows_RD, plan), plan), lambda plan, dy_ND: (dispatch(dy_ND, plan), None))
