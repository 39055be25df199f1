"""Attention for MLA on GPU's tensor cores, through Triton.

A program of the forward pass and of the queries' gradients takes a block of queries and walks the blocks of keys up to the
diagonal; one of the keys' gradients takes a block of keys and walks the blocks of queries from there. The softmax is online, in
base 2. Sequences that are no multiples of a block, and widths that are no powers of two, are padded first, so that no load is
guarded. A head's gradient of the rotary key is float32, and they are added up behind the kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dsv3_jax.kernels.attention.call import LN2, LOG2E, LOWEST, Operands, rows_of_segments
from dsv3_jax.kernels.modes import result
from dsv3_jax.kernels.tiles import dot, padded


class Blocks(NamedTuple):
    """Powers of two, as Triton has it."""

    queries: int
    keys: int
    warps: int
    stages: int


# By the bytes of a number: float32 is multiplied outside the tensor cores, and is twice as large in shared memory.
FORWARD = {2: Blocks(128, 64, 8, 3), 4: Blocks(32, 32, 8, 1)}
QUERIES = {2: Blocks(128, 64, 8, 3), 4: Blocks(32, 32, 8, 1)}
KEYS = {2: Blocks(32, 64, 4, 3), 4: Blocks(32, 32, 8, 1)}
NARROWEST = 16  # side of a product


def forward(operands: Operands, *, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """As `call.Forward`."""
    call = _Call(operands, FORWARD)
    (B, H, T, W), (block_T, block_S) = call.shape, call.blocks[:2]

    def kernel(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any, *refs: Any) -> None:
        *segments, out, lse = refs
        i, h, b = call.longest_first()
        at = pl.ds(i * block_T, block_T)
        queries = q[b, h, at, :], q_rope[b, h, at, :]

        def add(masked: bool, j: Any, carry: Any) -> Any:
            most, total, sums = carry
            to = pl.ds(j * block_S, block_S)
            s = _scores(queries, (k[b, h, to, :], k_rope[b, to, :]))
            if masked:
                s = jnp.where(call.seen(segments, b, i, j), s, -jnp.inf)
            peak = jnp.maximum(most, s.max(axis=1) * call.to_base_2)
            p, shrunk = jnp.exp2(s * call.to_base_2 - peak[:, None]), jnp.exp2(most - peak)  # one multiplication and sum
            return peak, total * shrunk + p.sum(axis=1), sums * shrunk[:, None] + dot(p.astype(v.dtype), v[b, h, to, :])

        start = jnp.full(block_T, LOWEST, jnp.float32), jnp.zeros(block_T, jnp.float32), jnp.zeros((block_T, W), jnp.float32)
        most, total, sums = call.over_keys(i, add, start)
        none = total == 0  # of padding
        total = jnp.where(none, 1.0, total)
        out[b, h, at, :] = (sums / total[:, None]).astype(out.dtype)
        lse[b, h, at] = jnp.where(none, 0.0, most * LN2 + jnp.log(total))

    shapes = [result((B, H, call.n_T * block_T, W), operands.v_BHSW.dtype, operands.v_BHSW, interpret)]
    shapes += [result((B, H, call.n_T * block_T), jnp.float32, operands.v_BHSW, interpret)]
    out, lse = call.run(kernel, shapes, (call.n_T, H, B), "mla_attention", interpret)
    return out[:, :, :T, : operands.v_BHSW.shape[3]], lse[:, :, :T]


def backward(
    operands: Operands, lse_BHT: jax.Array, delta_BHT: jax.Array, d_out_BHTW: jax.Array, *, interpret: Any
) -> tuple[jax.Array, ...]:
    """As `call.Backward`."""
    beside = lse_BHT, delta_BHT, d_out_BHTW
    return *_of_queries(operands, *beside, interpret), *_of_keys(operands, *beside, interpret)


def _of_queries(operands: Operands, lse: jax.Array, delta: jax.Array, d_out: jax.Array, interpret: Any) -> list[jax.Array]:
    call = _Call(operands, QUERIES, lse, delta, d_out)
    (B, H, T, _), (block_T, block_S) = call.shape, call.blocks[:2]

    def kernel(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any, *refs: Any) -> None:
        *segments, lse, delta, d_out, dq, dq_rope = refs
        i, h, b = call.longest_first()
        at = pl.ds(i * block_T, block_T)
        queries, g = (q[b, h, at, :], q_rope[b, h, at, :]), d_out[b, h, at, :]
        low, mean = lse[b, h, at][:, None] * LOG2E, delta[b, h, at][:, None]

        def add(masked: bool, j: Any, sums: Any) -> Any:
            to = pl.ds(j * block_S, block_S)
            keys = k[b, h, to, :], k_rope[b, to, :]
            p = jnp.exp2(_scores(queries, keys) * call.to_base_2 - low)
            if masked:
                p = jnp.where(call.seen(segments, b, i, j), p, 0.0)
            ds = (p * (dot(g, v[b, h, to, :].T) - mean)).astype(q.dtype)
            return tuple(total + dot(ds, x) for total, x in zip(sums, keys, strict=True))

        sums = call.over_keys(i, add, tuple(jnp.zeros(x.shape, jnp.float32) for x in queries))
        for total, ref in zip(sums, (dq, dq_rope), strict=True):
            ref[b, h, at, :] = (total * call.scale).astype(ref.dtype)

    shapes = [result(x.shape, x.dtype, operands.v_BHSW, interpret) for x in call.arrays[:2]]
    found = call.run(kernel, shapes, (call.n_T, H, B), "mla_attention_of_queries", interpret)
    return [x[:, :, :T, : ours.shape[3]] for x, ours in zip(found, operands[:2], strict=True)]


def _of_keys(operands: Operands, lse: jax.Array, delta: jax.Array, d_out: jax.Array, interpret: Any) -> list[jax.Array]:
    call = _Call(operands, KEYS, lse, delta, d_out)
    (B, H, _, _), (block_T, block_S), S = call.shape, call.blocks[:2], operands.v_BHSW.shape[2]

    def kernel(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any, *refs: Any) -> None:
        *segments, lse, delta, d_out, dk, dk_rope, dv = refs
        j, h, b = (pl.program_id(axis) for axis in range(3))
        to = pl.ds(j * block_S, block_S)
        keys, values = (k[b, h, to, :], k_rope[b, to, :]), v[b, h, to, :]

        def add(i: Any, sums: Any) -> Any:
            at = pl.ds(i * block_T, block_T)
            queries, g = (q[b, h, at, :], q_rope[b, h, at, :]), d_out[b, h, at, :]
            p = jnp.exp2(_scores(keys, queries) * call.to_base_2 - lse[b, h, at][None, :] * LOG2E)
            p = jnp.where(call.seen(segments, b, i, j, across=True), p, 0.0)
            ds = (p * (dot(values, g.T) - delta[b, h, at][None, :])).astype(q.dtype)
            pairs = (ds, queries[0]), (ds, queries[1]), (p.astype(v.dtype), g)
            return tuple(total + dot(*pair) for total, pair in zip(sums, pairs, strict=True))

        first = lax.div(jnp.maximum(j * block_S - call.offset, 0), block_T)
        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (*keys, values))
        sums = lax.fori_loop(first, call.n_T, add, zeros)
        for total, ref, factor in zip(sums, (dk, dk_rope, dv), (call.scale, call.scale, 1.0), strict=True):
            ref[b, h, to, :] = (total * factor).astype(ref.dtype)

    k, k_rope, v = call.arrays[2:5]
    kinds = (k.shape, k.dtype), ((B, H, *k_rope.shape[1:]), jnp.float32), (v.shape, v.dtype)
    shapes = [result(shape, dtype, operands.v_BHSW, interpret) for shape, dtype in kinds]
    dk, dk_rope, dv = call.run(kernel, shapes, (call.n_S, H, B), "mla_attention_of_keys", interpret)
    found = dk, dk_rope.sum(axis=1).astype(k.dtype), dv
    return [x[..., :S, : ours.shape[-1]] for x, ours in zip(found, operands[2:5], strict=True)]


class _Call:
    """The padded operands of a kernel, and what a block of queries sees of a block of keys."""

    def __init__(self, operands: Operands, table: dict[int, Blocks], *beside: jax.Array) -> None:
        q, q_rope, k, k_rope, v, segments_BS, self.scale = operands
        self.to_base_2 = self.scale * LOG2E
        self.blocks = blocks = table[q.dtype.itemsize]
        self.offset = k.shape[2] - q.shape[2]
        of_queries, of_keys = (partial(_padded, step=step) for step in blocks[:2])
        self.arrays = [of_queries(q), of_queries(q_rope), of_keys(k), of_keys(k_rope), of_keys(v)]
        self.n_T, self.n_S = self.arrays[0].shape[2] // blocks.queries, self.arrays[2].shape[2] // blocks.keys
        self.shape = (*q.shape[:3], self.arrays[4].shape[3])
        self.segments: list[jax.Array] = []
        if segments_BS is not None:
            self.segments = rows_of_segments(segments_BS, self.offset, *blocks[:2])
        self.beside = [padded(x, blocks.queries, -1) if x.ndim == 3 else of_queries(x) for x in beside]

    def run(self, kernel: Any, shapes: Any, grid: Any, name: str, interpret: Any) -> list[jax.Array]:
        params = plgpu.CompilerParams(num_warps=self.blocks.warps, num_stages=self.blocks.stages)
        call = pl.pallas_call(kernel, out_shape=shapes, grid=grid, compiler_params=params, name=name, interpret=interpret)
        return list(call(*self.arrays, *self.segments, *self.beside))

    def longest_first(self) -> tuple[Any, Any, Any]:
        """This program's block of queries, head and sequence. The last blocks see most keys: they start first."""
        return self.n_T - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)

    def seen(self, segments: Any, b: Any, i: Any, j: Any, *, across: bool = False) -> jax.Array:
        """[queries, keys], or `across` [keys, queries]."""

        def as_sides(queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (queries[None, :], keys[:, None]) if across else (queries[:, None], keys[None, :])

        both = list(zip((i, j), self.blocks[:2], strict=True))
        query, key = as_sides(*(jnp.arange(size, dtype=jnp.int32) + n * size for n, size in both))
        seen = key <= query + self.offset
        if segments:
            rows = (ref[b, 0, pl.ds(n * size, size)] for ref, (n, size) in zip(segments, both, strict=True))
            own, other = as_sides(*rows)
            seen = seen & (own == other)
        return seen

    def over_keys(self, i: Any, add: Callable[..., Any], carry: Any) -> Any:
        """`add` with and without a mask, for the blocks of keys that the queries of block i see in part and as a whole."""
        block_T, block_S = self.blocks[:2]
        first = self.offset + i * block_T
        whole = 0 if self.segments else lax.div(first + 1, block_S)
        some = jnp.minimum(lax.div(first + block_T + block_S - 1, block_S), self.n_S)
        return lax.fori_loop(whole, some, partial(add, True), lax.fori_loop(0, whole, partial(add, False), carry))


def _padded(x: jax.Array, step: int) -> jax.Array:
    """The sequence to a multiple of `step`, and the width to a power of two."""
    width = max(NARROWEST, pl.next_power_of_2(x.shape[-1]))
    return padded(padded(x, step), width, -1)


def _scores(rows: Any, columns: Any) -> jax.Array:
    return dot(rows[0], columns[0].T) + dot(rows[1], columns[1].T)
