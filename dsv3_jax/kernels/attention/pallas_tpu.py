"""Attention for MLA on TPU's matrix units: the forward pass.

The grid walks blocks of queries, then of keys. Within a step a loop goes over tiles of keys, with an online softmax in base 2.
Tiles above the diagonal are not computed, nor their blocks fetched; only those on it, or all where there are segments, are
masked. Scores are [queries, keys] (`rows_tpu`) or, where matrix units are wider, [keys, queries] (`turned_tpu`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.attention import rows_tpu, turned_tpu
from dsv3_jax.kernels.attention.call import Operands, cost_of, rows_of_segments
from dsv3_jax.kernels.attention.step_tpu import Ins, Step
from dsv3_jax.kernels.modes import chip, result
from dsv3_jax.kernels.tiles import LANES, MIB, padded, up


class Blocks(NamedTuple):
    """Queries and keys in VMEM; keys of one iteration, its queries (on the diagonal, if not turned); rows of a chunk."""

    queries: int = 1024
    keys: int = 4096
    tile: int = 512
    height: int = 512
    chunk: int = 32
    vmem_mib: int = 48
    columns: int = LANES  # keys, or queries if turned, of one product
    part: int = 0  # keys of one product if turned; 0: not turned, scores are [queries, keys]


# What needed the fewest bundles, see `experiments.bench_kernels`; other chips as v5p.
BLOCKS = Blocks()
TURNED = Blocks(queries=4096, keys=8192, tile=1024, height=1024, chunk=16, vmem_mib=60, columns=256, part=256)
BLOCKS_OF_CHIP = {"TPU v6 lite": TURNED._replace(chunk=32, part=512), "TPU7x": TURNED}


def forward(operands: Operands, *, interpret: Any, blocks: Blocks | None = None) -> tuple[jax.Array, jax.Array]:
    """As `call.Forward`."""
    q, q_rope, k, k_rope, v, segments_BS, scale = operands
    (B, H, T, C), (S, W), R = q.shape, v.shape[2:], q_rope.shape[3]
    blocks = blocks or BLOCKS_OF_CHIP.get(chip(), BLOCKS)
    step, how = step_of(blocks, T, S, W, scale), turned_tpu if blocks.part else rows_tpu
    block_T, block_S, offset = step.queries, step.keys, step.offset
    q, q_rope = (padded(x, block_T) for x in (q, q_rope))
    k, k_rope, v = (padded(x, block_S) for x in (k, k_rope, v))
    n_T, n_S = q.shape[2] // block_T, k.shape[2] // block_S
    segments = [] if segments_BS is None else rows_of_segments(segments_BS, offset, block_T, block_S)

    def kernel(*refs: Any) -> None:
        n = 5 + len(segments)
        ins, kept = Ins(*refs[:n]), how.Kept(*refs[n:])
        i, j = pl.program_id(2), pl.program_id(3)
        pl.when(j == 0)(lambda: how.start(ins, kept))
        how.walk(step, ins, kept, i, j)
        pl.when(j == n_S - 1)(lambda: how.finish(step, kept))

    def of_query(b: Any, h: Any, i: Any, j: Any) -> Any:
        return b, h, i, 0

    def last(i: Any, j: Any) -> Any:
        """Blocks above the diagonal: the one before them again, which is there already."""
        return jnp.minimum(j, lax.div(jnp.minimum(offset + (i + 1) * block_T, S) - 1, block_S))

    def of_key(b: Any, h: Any, i: Any, j: Any) -> Any:
        return b, h, last(i, j), 0

    side = (None, None)
    out, lse = pl.pallas_call(
        kernel,
        out_shape=[
            result((B, H, n_T * block_T, W), v.dtype, v, interpret),
            result((B, H, 1, n_T * block_T), jnp.float32, v, interpret),
        ],
        grid=(B, H, n_T, n_S),
        in_specs=[
            pl.BlockSpec((*side, block_T, C), of_query),
            pl.BlockSpec((*side, block_T, R), of_query),
            pl.BlockSpec((*side, block_S, C), of_key),
            pl.BlockSpec((None, block_S, R), lambda b, h, i, j: (b, last(i, j), 0)),
            pl.BlockSpec((*side, block_S, W), of_key),
            *[
                pl.BlockSpec((None, 1, block_T), lambda b, h, i, j: (b, 0, i)),
                pl.BlockSpec((None, 1, block_S), lambda b, h, i, j: (b, 0, last(i, j))),
            ][: len(segments)],
        ],
        out_specs=[
            pl.BlockSpec((*side, block_T, W), of_query),
            pl.BlockSpec((*side, 1, block_T), lambda b, h, i, j: (b, h, 0, i)),
        ],
        scratch_shapes=how.scratch(step, operands),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_mib * MIB
        ),
        cost_estimate=cost_of(operands, products_of_keys=1, products_of_values=1),
        name="mla_attention",
        interpret=interpret,
    )(q, q_rope, k, k_rope, v, *segments)
    return out[:, :, :T], lse[:, :, 0, :T]


def step_of(blocks: Blocks, T: int, S: int, W: int, scale: float) -> Step:
    """Of T queries, the last of S keys."""
    turned, tile = blocks.part > 0, min(blocks.tile, up(S, LANES))
    block_T, height = queries_of(blocks, T)
    part = blocks.part if turned and tile % blocks.part == 0 else tile
    step = Step(block_T, min(blocks.keys, up(S, tile)), tile, height, part, blocks.columns, blocks.chunk, T, S - T, W, scale)
    assert step.keys % tile == 0 and block_T % height == 0 and (tile if turned else height) % step.chunk == 0
    return step


def queries_of(blocks: Blocks, T: int) -> tuple[int, int]:
    """Of a grid step, and of an iteration (if not turned, on the diagonal): about as many in each, of whole registers."""
    if not blocks.part:
        block = min(blocks.queries, up(T, LANES))
        return block, fitting(blocks.height, block, blocks.chunk)
    pieces = pl.cdiv(T, blocks.height)
    height = up(pl.cdiv(T, pieces), LANES)
    return height * min(pieces, blocks.queries // blocks.height), height


def fitting(height: int, block: int, chunk: int) -> int:
    """The most rows, of whole chunks and at most `height`, of which a block has a whole number."""
    return max(rows for rows in range(chunk, min(height, block) + 1, chunk) if block % rows == 0)
