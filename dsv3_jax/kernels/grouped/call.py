"""What the implementations of a grouped product have in common: how they are called."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

# (products of a row with its matrix in each weight, the row's extras) -> outputs; all float32, [rows, columns]
Epilogue = Callable[[Sequence[jax.Array], Sequence[jax.Array]], Sequence[jax.Array]]
PARTIAL = 128  # columns that partial sums are added up to


class Out(NamedTuple):
    """An output's dtype, and whether of a row only the sum is asked for: then in however many parts, one a column."""

    dtype: Any
    partial: bool = False


class Products(Protocol):
    def __call__(
        self,
        x_RI: jax.Array,
        weights: Sequence[jax.Array],
        extras: Sequence[jax.Array],
        count_E: jax.Array,
        outs: Sequence[Out],
        epilogue: Epilogue,
        *,
        transposed: bool,
        name: str,
        interpret: Any,
    ) -> tuple[jax.Array, ...]:
        """`epilogue` of the products of each row with its group's matrix in each of `weights`, and that row of `extras`.

        `weights` [E, I, O], or `transposed` [E, O, I]; `extras` [R, O] or [R, 1]. Rows of no group become zeros.
        """


class OuterProducts(Protocol):
    def __call__(
        self, x_RI: jax.Array, y_RO: jax.Array, count_E: jax.Array, *, dtype: Any, name: str, interpret: Any
    ) -> jax.Array:
        """For each group the sum over its rows of x^T y: [E, I, O]; zeros where it has none."""
