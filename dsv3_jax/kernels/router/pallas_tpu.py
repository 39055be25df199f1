"""The router's choice on TPU: one pass over the logits, k + 1 rounds of the largest value that is left, and no sort.

Scores are made as they lie, and transposed: with tokens along lanes and experts along the registers' rows a maximum is a tree
of elementwise ones, which takes a few cycles where one across lanes takes a hundred, and a group is rows of its own. What a
token gets is written as [K, N], which in memory is as small as it looks; [N, K] would be padded to 128 lanes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.router.call import How, Routed, gates_of, scores_of
from dsv3_jax.kernels.tiles import LANES, MIB, SUBLANES, up
from dsv3_jax.kernels.traffic import Operand, moved


class Blocks(NamedTuple):
    """Tokens in VMEM, a multiple of LANES."""

    tokens: int
    vmem_mib: int = 32


BLOCKS = Blocks(512)
# Tokens that are chosen for together, two chains of steps that wait for each other; of which so many are scored at once. Loops
# keep their parts apart, and values that are left in VMEM: what was scheduled together would not fit the registers.
WIDTH, HEIGHT = 256, 64


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
    width = WIDTH if tokens % WIDTH == 0 else LANES
    size = experts // how.n_group

    def kernel(logits: Any, bias: Any, indices: Any, gates: Any, margin: Any, scores: Any, s_EN: Any, left: Any) -> None:
        if experts < left.shape[0]:
            left[experts:, :] = jnp.full((left.shape[0] - experts, width), -jnp.inf, jnp.float32)

        def part(p: Any, _: None) -> None:
            at = pl.ds(pl.multiple_of(p * width, width), width)

            def score(i: Any, _: None) -> None:
                rows = pl.ds(pl.multiple_of(p * width + i * HEIGHT, HEIGHT), HEIGHT)
                scores[rows, :] = scores_of(logits[rows, :], how.scoring)

            lax.fori_loop(0, width // HEIGHT, score, None)
            s_EN[:experts, :] = scores[at, :].T
            group = _iota((how.n_group, width), 0)

            def prepare(g: Any, total: Any, own: Any) -> Any:
                values = _without_nan(s_EN[own, :] + bias[own, :])
                left[own, :] = values
                return jnp.where(group == jnp.asarray(g, jnp.float32), _sum_of_largest(values, how.group_score_topk), total)

            total = jnp.zeros((how.n_group, width), jnp.float32)
            if size % SUBLANES == 0:
                total = lax.fori_loop(
                    0, how.n_group, lambda g, total: prepare(g, total, pl.ds(pl.multiple_of(g * size, size), size)), total
                )
            else:  # groups that begin within a register, at a place that must be known
                for g in range(how.n_group):
                    total = prepare(g, total, slice(g * size, (g + 1) * size))
            if how.topk_group < how.n_group:
                limit = _limits(total, how.topk_group)
                for g in range(how.n_group):
                    own = slice(g * size, (g + 1) * size)
                    left[own, :] = jnp.minimum(left[own, :], limit[g : g + 1])
            choice = _iota((how.k, width), 0)

            def choose_one(k: Any, state: Any) -> Any:
                chosen, gate, taken, before, _ = state

                def tile(t: int) -> tuple[Any, ...]:
                    own = slice(t * SUBLANES, (t + 1) * SUBLANES)
                    expert = _iota((SUBLANES, width), 0) + float(t * SUBLANES)
                    value = jnp.where(expert == taken, -jnp.inf, left[own, :])
                    left[own, :] = value
                    return value, expert, s_EN[own, :]

                value, expert, s = _first_of_largest(tile, 0, left.shape[0] // SUBLANES)
                top = value.max(axis=0, keepdims=True)
                index = jnp.where(value == top, expert, float(left.shape[0])).min(axis=0, keepdims=True)
                own_s = jnp.where(expert == index, s, 0.0).sum(axis=0, keepdims=True)
                here = choice == k.astype(jnp.float32)
                return jnp.where(here, index, chosen), jnp.where(here, own_s, gate), index, top, before - top

            zeros, none = jnp.zeros(choice.shape, jnp.float32), jnp.full((1, width), -1.0, jnp.float32)
            chosen, gate, *_, gap = lax.fori_loop(0, how.k + 1, choose_one, (zeros, zeros, none, none, none))
            indices[:, at] = chosen.astype(jnp.int32)
            gates[:, at] = gates_of(gate, how, 0)
            margin[:, at] = gap  # nothing left is -inf

        lax.fori_loop(0, tokens // width, part, None)

    specs = [pl.BlockSpec(operand.block, operand.at) for operand in operands]
    rows = up(experts, SUBLANES)
    indices_KN, gates_KN, margin_1N, scores_NE = pl.pallas_call(
        kernel,
        out_shape=[result(operand.shape, operand.dtype, logits_NE, interpret) for operand in operands[2:]],
        grid=(steps,),
        in_specs=specs[:2],
        out_specs=specs[2:],
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=BLOCKS.vmem_mib * MIB),
        name="router",
        interpret=interpret,
    )(logits_NE, bias_E[:, None])
    return Routed(indices_KN.T, gates_KN.T, scores_NE, margin_1N[0])


def _first_of_largest(tile: Callable[[int], tuple[Any, ...]], first: int, end: int) -> tuple[Any, ...]:
    """Of tiles of some experts each: row by row the largest value and what comes with it, of the first tile that has it."""
    if end == first + 1:
        return tile(first)
    middle = (first + end) // 2
    ours, theirs = _first_of_largest(tile, first, middle), _first_of_largest(tile, middle, end)
    larger = theirs[0] > ours[0]
    return tuple(jnp.where(larger, b, a) for a, b in zip(ours, theirs, strict=True))


def _limits(total_GN: jax.Array, groups: int) -> jax.Array:
    """What a group's values are at most: as they are in those that a token may choose from, -inf in the others."""
    group, before = _iota(total_GN.shape, 0), jnp.zeros(total_GN.shape, jnp.float32)
    for g in range(total_GN.shape[0]):  # how many are before it: those of a larger score, or of the same and a lower number
        other = total_GN[g : g + 1]
        ahead = (other > total_GN) | ((other == total_GN) & (group > float(g)))
        before = before + ahead.astype(jnp.float32)
    return jnp.where(before < float(groups), jnp.inf, -jnp.inf)


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
