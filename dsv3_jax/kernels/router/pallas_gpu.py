"""The router's choice on GPU, through Triton: a program holds some tokens' scores in registers, and writes what it chose."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.router.call import How, Routed, gates_of, scores_of


class Blocks(NamedTuple):
    tokens: int
    warps: int


BLOCKS = Blocks(1, 1)


def choose(logits_NE: jax.Array, bias_E: jax.Array, how: How, *, interpret: Any) -> Routed:
    """As `call.Choose`."""
    (n, experts), tokens = logits_NE.shape, BLOCKS.tokens
    width, size, columns = pl.next_power_of_2(experts), experts // how.n_group, pl.next_power_of_2(how.k)

    def kernel(logits: Any, bias: Any, indices: Any, gates: Any, scores: Any, margin: Any) -> None:
        i = pl.program_id(0)
        at, lane = pl.ds(i * tokens, tokens), jnp.arange(width, dtype=jnp.int32)[None, :]
        row = (i * tokens + jnp.arange(tokens, dtype=jnp.int32)) < n
        within = row[:, None] & (lane < experts)
        s = plgpu.load(logits.at[at, pl.ds(0, width)], mask=within, other=-jnp.inf)
        s = scores_of(jnp.where(within, s, -jnp.inf), how.scoring)
        plgpu.store(scores.at[at, pl.ds(0, width)], s, mask=within)
        bias_1E = plgpu.load(bias.at[pl.ds(0, width)], mask=lane[0] < experts, other=0.0)[None, :]
        left = s + bias_1E
        left = jnp.where(within, jnp.where(jnp.isnan(left), jnp.inf, left), -jnp.inf)  # as the TPU's
        if how.topk_group < how.n_group:
            groups = [(lane >= g * size) & (lane < (g + 1) * size) for g in range(how.n_group)]
            totals = [_sum_of_largest(jnp.where(own, left, -jnp.inf), lane, how.group_score_topk) for own in groups]
            kept = jnp.zeros(left.shape, jnp.bool_)
            for g, own in enumerate(groups):
                others = [(totals[o] >= totals[g]) if o < g else (totals[o] > totals[g]) for o in range(how.n_group) if o != g]
                before = sum((other.astype(jnp.int32) for other in others), start=jnp.zeros((tokens,), jnp.int32))
                kept = kept | (own & (before < how.topk_group)[:, None])
            left = jnp.where(kept, left, -jnp.inf)
        column = jnp.arange(columns, dtype=jnp.int32)[None, :]
        chosen, affinities = jnp.zeros((tokens, columns), jnp.int32), jnp.zeros((tokens, columns), jnp.float32)
        last = jnp.full((tokens,), jnp.inf)
        for k in range(how.k):
            last = left.max(axis=1)
            index = jnp.where(left == last[:, None], lane, experts).min(axis=1)
            own = lane == index[:, None]
            left = jnp.where(own, -jnp.inf, left)
            chosen = jnp.where(column == k, index[:, None], chosen)
            affinities = jnp.where(column == k, jnp.where(own, s, 0.0).sum(axis=1)[:, None], affinities)
        asked = row[:, None] & (column < how.k)
        plgpu.store(indices.at[at, pl.ds(0, columns)], chosen, mask=asked)
        plgpu.store(gates.at[at, pl.ds(0, columns)], gates_of(affinities, how, 1), mask=asked)
        plgpu.store(margin.at[at], last - left.max(axis=1), mask=row)

    return Routed(
        *pl.pallas_call(
            kernel,
            out_shape=[
                result((n, how.k), jnp.int32, logits_NE, interpret),
                result((n, how.k), jnp.float32, logits_NE, interpret),
                result((n, experts), jnp.float32, logits_NE, interpret),
                result((n,), jnp.float32, logits_NE, interpret),
            ],
            grid=(pl.cdiv(n, tokens),),
            compiler_params=plgpu.CompilerParams(num_warps=BLOCKS.warps),
            name="router",
            interpret=interpret,
        )(logits_NE, bias_E)
    )


def _sum_of_largest(values: jax.Array, lane: jax.Array, terms: int) -> jax.Array:
    """Of each row."""
    total = largest = values.max(axis=1)
    for _ in range(terms - 1):
        first = jnp.where(values == largest[:, None], lane, values.shape[1]).min(axis=1)
        values = jnp.where(lane == first[:, None], -jnp.inf, values)
        largest = values.max(axis=1)
        total = total + largest
    return total
