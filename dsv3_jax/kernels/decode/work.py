"""The work of decoding as a list: (part, block of the cache), the blocks of each part one after the other.

A part is a sequence's share of one split: a run of whole blocks. One that has no rows is in the list once, for its result.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

# Of the largest chips: v5p's; an H200's 132, of which each runs two programs, twice, as lengths are not alike.
CORES = {"pallas_tpu": 2, "pallas_gpu": 528}
PER_CORE = {"pallas_tpu": 1 << 30, "pallas_gpu": 32}  # heads times queries that one takes at once
SHORTEST = 512  # rows of a split worth combining


def splits_for(implementation: str, sequences: int, queries: int, rows: int) -> int:
    """Parts of each sequence's rows that give every core work; `queries`: of a sequence, all heads'."""
    name = implementation.partition(":")[0]
    whole = sequences * -(-queries // PER_CORE[name])
    return max(1, min(-(-CORES[name] // whole), rows // SHORTEST))


class Work(NamedTuple):
    """Entries, in order; core l takes those from first[l] to first[l + 1]: about as many as the other, and whole parts."""

    part_E: Int[Array, " E"]  # sequence * splits + split
    block_E: Int[Array, " E"]
    first_L: Int[Array, " L"]


def runs(visible_B: Int[Array, " B"], rows: int, splits: int) -> tuple[Int[Array, "B X"], Int[Array, "B X"]]:
    """First block of each sequence's splits, and the one behind the last."""
    blocks_B1 = ((visible_B + (rows - 1)) // rows).astype(jnp.int32)[:, None]
    each_B1, split_1X = (blocks_B1 + (splits - 1)) // splits, jnp.arange(splits, dtype=jnp.int32)[None, :]
    return jnp.minimum(each_B1 * split_1X, blocks_B1), jnp.minimum(each_B1 * (split_1X + 1), blocks_B1)


def make_work(visible_B: Int[Array, " B"], rows: int, splits: int, most: int, cores: int) -> Work:
    """`visible_B`: rows that a sequence's last query sees, at most `most`; `rows`: of a block; `cores`: 1 or 2."""
    first_BX, end_BX = runs(visible_B, rows, splits)
    first_P, count_P = first_BX.reshape(-1), jnp.maximum((end_BX - first_BX).reshape(-1), 1)
    parts = count_P.shape[0]
    end_P = jnp.cumsum(count_P, dtype=jnp.int32)
    entry_E = jnp.arange(visible_B.shape[0] * (-(-most // rows) + splits), dtype=jnp.int32)
    part_E = jnp.minimum(jnp.searchsorted(end_P, entry_E, side="right").astype(jnp.int32), parts - 1)
    begin_P, total = end_P - count_P, end_P[-1]
    block_E = first_P[part_E] + entry_E - begin_P[part_E]
    middle = [begin_P[jnp.minimum(jnp.searchsorted(begin_P, total // 2), parts - 1)]] * (cores - 1)
    return Work(part_E, block_E, jnp.stack([jnp.int32(0), *middle, total]))
