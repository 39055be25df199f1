"""Expert parallelism [§2.1.2, §3.2.2]: rows travel to the ranks that hold their experts, and back. None is ever dropped.

A *row* is one (token, chosen expert) pair; a rank has R = N * K of them. What a rank receives depends on the router, so no
fixed buffer is safe, and the worst case (every row of every rank) is P times the usual one. Hence *rounds*: a rank receives
at most C = P * ceil(exchange_buffer * R / P) rows at a time (never more than could exist, P * N * min(K, E / P)), and when any
rank of the mesh has more, all ranks go another round. A rank's memory is bounded by C and R, whatever the router does.

Every pair of ranks has a queue, its rows in order of experts. A round takes
  ragged: the next C rows of a receiver's queues on end, sender by sender, with `jax.lax.ragged_all_to_all`;
  padded: the next C / P rows of each queue, with a plain `all_to_all` of equal blocks, for backends without the former.

The backward pass replays the rounds from the layer's inputs: nothing that a round computes is stored.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.fp8.linear import keep
from dsv3_jax.fp8.precision import AS_IT_IS, Wire
from dsv3_jax.fp8.quantize import Quantised, Quantiser
from dsv3_jax.moe.dispatch import make_plan, sum_rows, take_rows
from dsv3_jax.parallel.collectives import Placement, varying, varying_like

Weights = Mapping[str, Any]  # gate_proj, up_proj, down_proj: [E, _, _] arrays, or stored in few bits (`dsv3_jax.weights`)
Local = Callable[[Array, Array, Array, Weights], Array]  # (x [C, D], expert [C, 1], gates [C, 1], weights) -> y [C, D]


def buffer_rows(n_tokens: int, top_k: int, ranks: int, n_experts: int, exchange_buffer: float) -> int:
    """C of the module's formula: rows that a rank of `n_tokens` tokens receives at most in one round."""
    per_pair = math.ceil(exchange_buffer * n_tokens * top_k / ranks)
    return ranks * min(per_pair, n_tokens * min(top_k, n_experts // ranks))


class Queues(NamedTuple):
    """Who sends how much to whom; the same on every rank of the expert axis. S sender, P receiver, e an expert of a rank."""

    count_SPe: Int[Array, "S P e"]

    @property
    def count_SP(self) -> Int[Array, "S P"]:
        return self.count_SPe.sum(axis=2, dtype=jnp.int32)


class Exchange(NamedTuple):
    """One direction and its reverse, of round r. `send` and `give_back` are linear and each other's transposes.

    `rounds(queues)`: the number of rounds that this expert group needs.
    `experts(queues, r)`: [C] the local number of each received row's expert, E / P where the buffer is empty.
    `send(rows_R, start_P, queues, r)`: [R, ...] rows in order of experts -> [C, ...], zeros where the buffer is empty.
    `give_back(rows_C, rows_R, start_P, queues, r)`: the round's rows put back in their places among rows_R.
    """

    rounds: Callable[..., Array]
    experts: Callable[..., Array]
    send: Callable[..., Array]
    give_back: Callable[..., Array]


def _before(count: Array, axis: int) -> Array:
    """Exclusive cumulative sum."""
    return jnp.cumsum(count, axis=axis, dtype=jnp.int32) - count


def _expert_at(position: Array, count_e: Array) -> Array:
    """The segment that `position` falls into, of segments of `count_e` rows on end; their number if it is beyond them."""
    return jnp.searchsorted(jnp.cumsum(count_e, dtype=jnp.int32), position, side="right").astype(jnp.int32)


def padded(ranks: int, capacity: int, axes: tuple[str, ...]) -> Exchange:
    """Equal blocks of C / P rows for every pair of ranks of `axes`."""
    block = capacity // ranks
    iota_b = jnp.arange(block, dtype=jnp.int32)

    def rounds(queues: Queues) -> Array:
        return (queues.count_SP.max() + block - 1) // block

    def experts(queues: Queues, r: Array) -> Array:
        own_Se = lax.dynamic_index_in_dim(queues.count_SPe, lax.axis_index(axes), axis=1, keepdims=False)
        return jax.vmap(partial(_expert_at, r * block + iota_b))(own_Se).reshape(capacity)

    def send(rows_R: Array, start_P: Array, queues: Queues, r: Array) -> Array:
        own_P = lax.dynamic_index_in_dim(queues.count_SP, lax.axis_index(axes), axis=0, keepdims=False)
        place_Pb = (r * block + iota_b)[None, :]
        index_C = (start_P[:, None] + place_Pb).reshape(capacity)
        is_row_C = (place_Pb < own_P[:, None]).reshape((capacity,) + (1,) * (rows_R.ndim - 1))
        blocks = jnp.where(is_row_C, take_rows(rows_R, jnp.minimum(index_C, rows_R.shape[0] - 1)), 0)
        return lax.all_to_all(blocks, axes, split_axis=0, concat_axis=0, tiled=True)

    def give_back(rows_C: Array, rows_R: Array, start_P: Array, queues: Queues, r: Array) -> Array:
        blocks = lax.all_to_all(rows_C, axes, split_axis=0, concat_axis=0, tiled=True)
        iota_R = jnp.arange(rows_R.shape[0], dtype=jnp.int32)
        receiver_R = jnp.searchsorted(start_P, iota_R, side="right").astype(jnp.int32) - 1
        place_R = iota_R - start_P[receiver_R] - r * block
        now_R = ((place_R >= 0) & (place_R < block)).reshape((-1,) + (1,) * (rows_R.ndim - 1))
        return jnp.where(now_R, take_rows(blocks, jnp.clip(receiver_R * block + place_R, 0, capacity - 1)), rows_R)

    return Exchange(rounds, experts, send, give_back)


def ragged(ranks: int, capacity: int, axes: tuple[str, ...]) -> Exchange:
    """As many rows of every pair as there are, a receiver's queues on end."""

    def rounds(queues: Queues) -> Array:
        return (queues.count_SP.sum(axis=0, dtype=jnp.int32).max() + capacity - 1) // capacity

    def experts(queues: Queues, r: Array) -> Array:
        own_Se = lax.dynamic_index_in_dim(queues.count_SPe, lax.axis_index(axes), axis=1, keepdims=False)
        place_C = r * capacity + jnp.arange(capacity, dtype=jnp.int32)
        n_own, segment_C = own_Se.shape[1], _expert_at(place_C, own_Se.reshape(-1))
        return jnp.where(segment_C < own_Se.size, segment_C % n_own, n_own)

    def windows(queues: Queues, r: Array) -> tuple[Array, Array, Array]:
        """For every pair: the first of its rows in this round, their number, and their place in the receiver's buffer."""
        count_SP = queues.count_SP
        offset_SP = _before(count_SP, 0) - r * capacity
        first_SP, last_SP = (jnp.clip(bound - offset_SP, 0, count_SP) for bound in (0, capacity))
        return first_SP, last_SP - first_SP, jnp.clip(offset_SP, 0, capacity)

    def send(rows_R: Array, start_P: Array, queues: Queues, r: Array) -> Array:
        rank, (first_SP, size_SP, place_SP) = lax.axis_index(axes), windows(queues, r)
        first_P, size_P, place_P = (lax.dynamic_index_in_dim(a, rank, 0, keepdims=False) for a in (first_SP, size_SP, place_SP))
        received_S = lax.dynamic_index_in_dim(size_SP, rank, 1, keepdims=False)
        empty = varying_like(rows_R, jnp.zeros((capacity, *rows_R.shape[1:]), rows_R.dtype))
        return lax.ragged_all_to_all(rows_R, empty, start_P + first_P, size_P, place_P, received_S, axis_name=axes)

    def give_back(rows_C: Array, rows_R: Array, start_P: Array, queues: Queues, r: Array) -> Array:
        rank, (first_SP, size_SP, place_SP) = lax.axis_index(axes), windows(queues, r)
        place_S, size_S = (lax.dynamic_index_in_dim(a, rank, 1, keepdims=False) for a in (place_SP, size_SP))
        start_SP = _before(queues.count_SP, 1)  # where each sender's rows for each receiver begin
        target_S = lax.dynamic_index_in_dim(start_SP + first_SP, rank, 1, keepdims=False)
        returned_P = lax.dynamic_index_in_dim(size_SP, rank, 0, keepdims=False)
        return lax.ragged_all_to_all(rows_C, rows_R, place_S, size_S, target_S, returned_P, axis_name=axes)

    return Exchange(rounds, experts, send, give_back)


def exchanged_experts(
    x_ND: Float[Array, "N D"],
    indices_NK: Int[Array, "N K"],
    gates_NK: Float[Array, "N K"],
    weights: Weights,
    local: Local,
    placement: Placement,
    wire: Wire = AS_IT_IS,
) -> Float[Array, "N D"]:
    """The routed sum of eq. 12 for a rank's own tokens, with `weights` of its own experts; inside shard_map.

    `local` computes the experts of rows that are here. Where tensor ranks cut experts' matrices the result is a partial sum.
    `wire`: how rows are rounded before they travel, forward and backward; what the experts return travels as it is.
    """
    varied = varying_like((x_ND, weights), (x_ND, gates_NK, weights))
    return _exchanged(*varied[:2], indices_NK, varied[2], local, placement, wire)


class _Route(NamedTuple):
    """The rank's own rows: which token each is, where each receiver's begin, and who sends what."""

    token_R: Array
    choice_R: Array
    row_NK: Array
    start_P: Array
    queues: Queues
    n_rounds: Array
    exchange: Exchange


def _route(indices_NK: Array, n_own: int, placement: Placement) -> _Route:
    axes = placement.expert_axes
    ranks = math.prod(placement.sizes[axis] for axis in axes)
    plan = make_plan(indices_NK, ranks * n_own)
    count_SE = lax.all_gather(plan.count_E, axes)
    queues = Queues(count_SE.reshape(ranks, ranks, n_own))
    name = placement.parallel.exchange
    kind = {"ragged": ragged, "padded": padded, "auto": padded if placement.platform == "cpu" else ragged}[name]
    n_tokens, top_k = indices_NK.shape
    capacity = buffer_rows(n_tokens, top_k, ranks, ranks * n_own, placement.parallel.exchange_buffer)
    exchange = kind(ranks, capacity, axes)
    n_rounds = lax.pmax(varying(exchange.rounds(queues), placement.token_axes), placement.token_axes)
    return _Route(plan.token_R, plan.choice_R, plan.row_NK, plan.start_E[::n_own], queues, n_rounds, exchange)


def _in_rounds(n_rounds: Array, body: Callable, carry: Any) -> Any:
    return lax.fori_loop(jnp.int32(0), n_rounds, body, carry)


def _on_the_wire(x_ND: Array, how: Quantiser | None) -> Any:
    """What is sent of every row of tokens."""
    return x_ND if how is None else keep(x_ND, how)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _exchanged(
    x_ND: Array, gates_NK: Array, indices_NK: Array, weights: Weights, local: Local, placement: Placement, wire: Wire
) -> Array:
    route = _route(indices_NK, weights["gate_proj"].shape[0], placement)
    x, gates_R1 = _rows(_on_the_wire(x_ND, wire.x), route), gates_NK.reshape(-1, 1)[route.choice_R]

    def one_round(r: Array, y_RD: Array) -> Array:
        send = partial(route.exchange.send, start_P=route.start_P, queues=route.queues, r=r)
        expert_C1 = route.exchange.experts(route.queues, r)[:, None]
        y_CD = local(_sent(send, x, x_ND.dtype), expert_C1, send(gates_R1), weights)
        return route.exchange.give_back(y_CD, y_RD, route.start_P, route.queues, r)

    zeros = jnp.zeros((route.token_R.shape[0], x_ND.shape[1]), x_ND.dtype)
    y_RD = _in_rounds(route.n_rounds, one_round, varying_like((x_ND, weights), zeros))
    return sum_rows(y_RD, route.row_NK).astype(x_ND.dtype)


def _rows(tokens: Any, route: _Route) -> Any:
    """Every row's copy of its token."""
    return jax.tree.map(lambda a: take_rows(a, route.token_R), tokens)


def _sent(send: Callable[[Array], Array], rows: Any, dtype: Any) -> Array:
    """Rows that have arrived, in `dtype`; in FP8 they travel as bytes, with their scales beside them."""
    if not isinstance(rows, Quantised):
        return send(rows)
    received = replace(rows, values=send(rows.values), scale=send(rows.scale))
    return replace(received, sides=received.values.shape).astype(dtype)


def _exchanged_forward(
    x_ND: Array, gates_NK: Array, indices_NK: Array, weights: Weights, local: Local, placement: Placement, wire: Wire
):
    tokens = _on_the_wire(x_ND, wire.x)
    like_x = varying_like(x_ND, jnp.zeros((0,), x_ND.dtype))
    y_ND = _exchanged(x_ND, gates_NK, indices_NK, weights, local, placement, wire)
    return y_ND, (tokens, like_x, gates_NK, indices_NK, weights)


def _exchanged_backward(local: Local, placement: Placement, wire: Wire, saved: Any, dy_ND: Array):
    tokens, like_x, gates_NK, indices_NK, weights = saved
    route = _route(indices_NK, weights["gate_proj"].shape[0], placement)
    x, dy = _rows(tokens, route), _rows(_on_the_wire(dy_ND, wire.gradient), route)
    gates_R1 = gates_NK.reshape(-1, 1)[route.choice_R]

    def one_round(r: Array, carry: Any) -> Any:
        dx_RD, dgates_R1, dweights = carry
        send = partial(route.exchange.send, start_P=route.start_P, queues=route.queues, r=r)
        give_back = partial(route.exchange.give_back, start_P=route.start_P, queues=route.queues, r=r)
        expert_C1 = route.exchange.experts(route.queues, r)[:, None]
        x_CD, dy_CD = _sent(send, x, like_x.dtype), _sent(send, dy, dy_ND.dtype)
        _, pull_back = jax.vjp(lambda x, gates, w: local(x, expert_C1, gates, w), x_CD, send(gates_R1), weights)
        dx_CD, dgates_C1, more = pull_back(dy_CD)
        dweights = jax.tree.map(lambda a, b: a + b.astype(a.dtype), dweights, more)
        return give_back(dx_CD, dx_RD), give_back(dgates_C1, dgates_R1), dweights

    # Summed over rounds in float32: two rounds of the same expert must not round twice.
    zeros = (
        jnp.zeros((route.token_R.shape[0], dy_ND.shape[1]), like_x.dtype),
        jnp.zeros_like(gates_R1),
        jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights),
    )
    dx_RD, dgates_R1, dweights = _in_rounds(route.n_rounds, one_round, varying_like((dy_ND, weights), zeros))
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    dgates_NK = dgates_R1[route.row_NK, 0]
    return sum_rows(dx_RD, route.row_NK).astype(like_x.dtype), dgates_NK, None, dweights


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)
