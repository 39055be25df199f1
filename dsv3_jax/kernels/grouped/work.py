"""The work of a grouped product as a list: (group, tile of rows), one entry for each tile that a group's rows touch.

Rows are sorted by group and tiles have a fixed height, so a group's first and last tile may hold rows of its neighbours: such a
tile is in the list once for each of them, one after the other.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Work(NamedTuple):
    """S entries, of which the first `size` are valid; in those behind them `group` is the number of groups. All int32."""

    group_S: Int[Array, " S"]
    tile_S: Int[Array, " S"]
    first_G: Int[Array, " G"]  # row of each group
    end_G: Int[Array, " G"]  # row behind its last
    size: Int[Array, ""]


def make_work(count_G: Int[Array, " G"], rows: int, tile: int, *, empty: bool = False) -> Work:
    """`empty`: groups without a row have an entry too, of the tile where their rows would be."""
    n_tiles, n_groups = -(-rows // tile), count_G.shape[0]
    end_G = jnp.cumsum(count_G, dtype=jnp.int32)
    first_G = end_G - count_G
    first_tile_G = jnp.minimum(first_G // tile, n_tiles - 1)
    entries_G = jnp.where(count_G > 0, (end_G - 1) // tile - first_tile_G + 1, int(empty)).astype(jnp.int32)
    entries_end_G = jnp.cumsum(entries_G, dtype=jnp.int32)
    entry_S = jnp.arange(n_tiles + n_groups, dtype=jnp.int32)
    group_S = jnp.searchsorted(entries_end_G, entry_S, side="right").astype(jnp.int32)
    own_S = jnp.minimum(group_S, n_groups - 1)
    tile_S = first_tile_G[own_S] + entry_S - (entries_end_G - entries_G)[own_S]
    return Work(group_S, jnp.minimum(tile_S, n_tiles - 1).astype(jnp.int32), first_G, end_G, entries_end_G[-1])
