"""Walks over a jaxpr and every jaxpr inside it: what a program holds and in which dtypes it computes."""

import math
from collections.abc import Iterator
from typing import Any

import jax.extend


def sub_jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, jax.extend.core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from sub_jaxprs(item)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of scans, loops, branches and calls included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in sub_jaxprs(value):
                yield from equations(inner)


def arrays(jaxpr: Any) -> Iterator[Any]:
    """Shape and dtype of every result of every equation."""
    for equation in equations(jaxpr):
        yield from (out.aval for out in equation.outvars if hasattr(out.aval, "shape"))


def largest_array(jaxpr: Any) -> int:
    """Elements of the largest result."""
    return max(math.prod(a.shape) for a in arrays(jaxpr))
