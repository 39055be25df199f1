"""What the implementations of scaled products have in common: how they are called."""

from typing import Any, NamedTuple, Protocol

import jax

SIDE = 128  # of a tile along the contraction: what is added up under one scale


class Tiled(NamedTuple):
    """An operand, whose sides along the contraction are whole tiles."""

    values: jax.Array  # FP8
    scale: jax.Array  # float32, of each tile


class Products(Protocol):
    def __call__(
        self, a: Tiled, b: Tiled, count_E: jax.Array, *, transposed: bool, dtype: Any, name: str, interpret: Any
    ) -> jax.Array:
        """Each row times its group's matrix: [R, O]; rows of no group become zeros.

        a: [R, I], scales [R, I / SIDE]; b: [E, I, O], or `transposed` [E, O, I], a scale a SIDE x SIDE block.
        """


class OuterProducts(Protocol):
    def __call__(self, a: Tiled, b: Tiled, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any) -> jax.Array:
        """For each group the sum over its rows of a [I, R] times b [R, O]: [E, I, O]; zeros where it has none.

        Scales [I, R / SIDE] and [R / SIDE, O]. The groups' counts are whole tiles.
        """
