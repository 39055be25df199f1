"""What the implementations of scaled products have in common: how they are called."""

from typing import Any, Protocol

import jax

SIDE = 128  # of a tile along the contraction: what is added up under one scale


class Products(Protocol):
    def __call__(
        self,
        x_RI: jax.Array,
        x_scale: jax.Array,
        w: jax.Array,
        w_scale: jax.Array,
        count_E: jax.Array,
        *,
        transposed: bool,
        dtype: Any,
        name: str,
        interpret: Any,
    ) -> jax.Array:
        """Each row times its group's matrix: [R, O]; rows of no group become zeros.

        x [R, I], scales [R, I / SIDE]; w [E, I, O], or `transposed` [E, O, I], a scale a SIDE x SIDE block. I is whole tiles.
        """


class OuterProducts(Protocol):
    def __call__(
        self,
        x_IR: jax.Array,
        x_scale: jax.Array,
        y_RO: jax.Array,
        y_scale: jax.Array,
        count_E: jax.Array,
        *,
        dtype: Any,
        name: str,
        interpret: Any,
    ) -> jax.Array:
        """For each group the sum over its rows, x y: [E, I, O]; zeros where it has none.

        Scales [I, R / SIDE] and [R / SIDE, O]. R and the groups' counts are whole tiles.
        """
