"""What one step of the forward kernels' grid works on, and how it is seen: by queries or, turned on its side, by keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dsv3_jax.kernels.attention.call import LOWEST
from dsv3_jax.kernels.tiles import LANES


class Step(NamedTuple):
    """Sizes: of the blocks in VMEM, of an iteration over them, of all; and where the diagonal is."""

    queries: int
    keys: int
    tile: int  # keys of an iteration
    height: int  # queries of an iteration
    part: int  # keys of one product
    columns: int
    chunk: int
    length: int  # queries in all
    offset: int  # keys before the first query
    width: int  # of a value
    scale: float

    def first(self, i: Any, j: Any) -> Any:
        """The first query of block i, counted from the first key of block j."""
        return self.offset + i * self.queries - j * self.keys

    def tiles_of(self, first: Any, height: int) -> tuple[Any, Any]:
        """Tiles that all of `height` queries from the first one on see whole, and those that some see of."""
        ends, tiles = (first + 1, first + height + self.tile - 1), self.keys // self.tile
        whole, some = (jnp.clip(lax.div(jnp.maximum(n, 0), self.tile), 0, tiles) for n in ends)
        return whole, some


class Ins(NamedTuple):
    """A step's blocks: [queries, width] and [keys, width]; of documents, where there are any, [1, queries] and [1, keys]."""

    q: Any
    q_rope: Any
    k: Any
    k_rope: Any
    v: Any
    own: Any = None
    others: Any = None


def reset(kept: Any) -> None:
    """Before the first key; of either way's `Kept`."""
    kept.most[...] = jnp.full(kept.most.shape, LOWEST, jnp.float32)
    kept.total[...] = jnp.zeros(kept.total.shape, jnp.float32)
    kept.sums[...] = jnp.zeros(kept.sums.shape, jnp.float32)


def column_of(row: jax.Array) -> jax.Array:
    """[1, size] -> [size, LANES], the same in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def wide(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES], the same in all lanes -> [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.concatenate([x] * pl.cdiv(width, LANES), axis=1)[:, :width]


def beside(content: jax.Array, rope: jax.Array) -> jax.Array:
    """In registers, where it costs nothing: the matrix units sum over both at once, and are deep enough on some chips."""
    return jnp.concatenate([content, rope], axis=1)
