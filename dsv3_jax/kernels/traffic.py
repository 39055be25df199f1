"""Bytes between memory and a kernel, from its grid."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Operand(NamedTuple):
    """An array [*shape], which step `at(*grid)` reads or writes one block of; the last blocks may reach beyond the edge."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int, ...]
    at: Callable[..., tuple[Any, ...]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def moved(grid: Sequence[int], operands: Sequence[Operand]) -> int:
    """Of all steps in order: a block moves where it is not that of the step before, and of it what is within the array."""
    total = 0
    for operand in operands:
        before = None
        for step in itertools.product(*map(range, grid)):
            at = operand.at(*step)
            if at != before:
                sides = (min(b, size - i * b) for i, b, size in zip(at, operand.block, operand.shape, strict=True))
                total += math.prod(sides) * operand.dtype.itemsize
            before = at
    return total
