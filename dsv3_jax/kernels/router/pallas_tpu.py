"""The router's choice on TPU: one pass over the logits, k + 1 rounds of the largest value that is left, and no sort.

Scores are made as they lie, and transposed: with tokens along lanes and experts along the registers' rows a maximum is a tree
of elementwise ones, which takes a few cycles where one across lanes takes a hundred, and a group is rows of its own. What a
token gets is written as [K, N], which in memory is as small as it looks; [N, K] would be padded to 128 lanes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.router.call import How, Routed, gates_of, scores_of
from dsv3_jax.kernels.tiles import LANES, MIB
from dsv3_jax.kernels.traffic import Operand, moved


class Blocks(NamedTuple):
    """Tokens in VMEM, a multiple of LANES, of which so many are held in registers."""

    tokens: int
    vmem_mib: int = 32


BLOCKS = Blocks(512)


def _operands(n: int, experts: int, k: int) -> tuple[int, list[Operand]]:
    """Steps; logits, bias, then what is written: indices, gates, margin, scores."""
    tokens, real, whole = min(BLOCKS.tokens, -(-n // LANES) * LANES), jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)
    rows = Operand((n, experts), real, (tokens, experts), lambda i: (i, 0))
    bias = Operand((experts, 1), real, (experts, 1), lambda i: (0, 0))
    few = [
        Operand((size, n), kind, (size, tokens), lambda i: (0, i)) for size, kind in ((k, whole), (k, real), (1, real))
    ]  # fmt: skip
    return pl.cdiv(n, tokens), [rows, bias, *few, rows]


def bytes_moved(n: int, experts: int, k: int) -> int:
    """Between memory and chip in one call, from its grid."""
    steps, operands = _operands(n, experts, k)
    return moved((steps,), operands)


def choose(logits_NE: jax.Array, bias_E: jax.Array, how: How, *, interpret: Any) -> Routed:
    """As `call.Choose`."""
    n, experts = logits_NE.shape
    steps, operands = _operands(n, experts, how.k)
    tokens = operands[0].block[0]

    def kernel(logits: Any, bias: Any, indices: Any, gates: Any, margin: Any, scores: Any) -> None:
        def part(p: Any, _: None) -> None:
            at = pl.ds(pl.multiple_of(p * LANES, LANES), LANES)
            s = scores_of(logits[at, :], how.scoring)
            scores[at, :] = s
            s_EN = s.T
            left = _without_nan(s_EN + bias[...])
            if how.topk_group < how.n_group:
                left = jnp.where(_is_kept(left, how), left, -jnp.inf)
            expert, choice = _iota(left.shape, 0), _iota((how.k, LANES), 0)
            chosen = gate = jnp.zeros(choice.shape, jnp.float32)
            last = jnp.zeros((1, LANES), jnp.float32)
            for k in range(how.k):
                last = left.max(axis=0, keepdims=True)
                index = jnp.where(left == last, expert, float(experts)).min(axis=0, keepdims=True)
                own = expert == index
                left = jnp.where(own, -jnp.inf, left)
                chosen = jnp.where(choice == k, index, chosen)
                gate = jnp.where(choice == k, jnp.where(own, s_EN, 0.0).sum(axis=0, keepdims=True), gate)
            indices[:, at] = chosen.astype(jnp.int32)
            gates[:, at] = gates_of(gate, how, 0)
            margin[:, at] = last - left.max(axis=0, keepdims=True)  # nothing left is -inf

        lax.fori_loop(0, tokens // LANES, part, None)

    specs = [pl.BlockSpec(operand.block, operand.at) for operand in operands]
    indices_KN, gates_KN, margin_1N, scores_NE = pl.pallas_call(
        kernel,
        out_shape=[result(operand.shape, operand.dtype, logits_NE, interpret) for operand in operands[2:]],
        grid=(steps,),
        in_specs=specs[:2],
        out_specs=specs[2:],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=BLOCKS.vmem_mib * MIB),
        name="router",
        interpret=interpret,
    )(logits_NE, bias_E[:, None])
    return Routed(indices_KN.T, gates_KN.T, scores_NE, margin_1N[0])


def _is_kept(left_EN: jax.Array, how: How) -> jax.Array:
    """Whether an expert's group is among those that its token may choose from: [E, N]."""
    experts, n = left_EN.shape
    size = experts // how.n_group
    group = lax.broadcasted_iota(jnp.int32, (how.n_group, n), 0)
    total = jnp.zeros((how.n_group, n), jnp.float32)
    for g in range(how.n_group):
        total = jnp.where(group == g, _sum_of_largest(left_EN[g * size : (g + 1) * size], how.group_score_topk), total)
    # How many groups are before this one: those of a larger score, or of the same and a lower number.
    before = jnp.zeros((how.n_group, n), jnp.int32)
    for g in range(how.n_group):
        other = total[g : g + 1]
        before = before + ((other > total) | ((other == total) & (group > g))).astype(jnp.int32)
    kept = (before < how.topk_group).astype(jnp.float32)
    first = lax.broadcasted_iota(jnp.int32, (experts, how.n_group), 1) * size
    expert = lax.broadcasted_iota(jnp.int32, (experts, how.n_group), 0)
    members = ((expert >= first) & (expert < first + size)).astype(jnp.float32)
    # Which spreads it from groups to their experts, and exactly: one of the products is not 0.
    return jnp.dot(members, kept, preferred_element_type=jnp.float32) > 0.5


def _sum_of_largest(values: jax.Array, terms: int) -> jax.Array:
    """Of each column: [1, N]."""
    row = _iota(values.shape, 0)
    total = largest = values.max(axis=0, keepdims=True)
    for _ in range(terms - 1):
        first = jnp.where(values == largest, row, float(values.shape[0])).min(axis=0, keepdims=True)
        values = jnp.where(row == first, -jnp.inf, values)
        largest = values.max(axis=0, keepdims=True)
        total = total + largest
    return total


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """In float32, where numbers of experts are exact: the chips find the least of floats, not of integers."""
    return lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.float32)


def _without_nan(values: jax.Array) -> jax.Array:
    """A NaN before everything, and equal to itself, so that a round finds one expert and takes it away."""
    return jnp.where(jnp.isnan(values), jnp.inf, values)
