"""Initial parameters, N(0, initializer_range) with gains at 1 [§4.2], any piece of any of them by itself.

Drawn on the host: the same numbers on every device, mesh and JAX release, and no compilation of a generator for each shape
(which took longer than the draw by far). A parameter's elements, in row-major order, come in blocks, each from a stream of its
own, keyed by the seed, the parameter's name and the block's number. So a process draws what its devices hold, and little more.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dsv3_jax.model.spec import Spec, SpecTree
from dsv3_jax.parallel.rules import map_specs

BLOCK = 2**21  # elements
Index = tuple[slice, ...]


def initial_values(specs: SpecTree, initializer_range: float, seed: int, ulps: int = 0) -> Any:
    """A tree like `specs` of functions `draw(index)`, which give a piece of the parameter, float32.

    `ulps`: every number is the so many-th above the one drawn: what a run then does differently is chaos, and no more.
    """
    return map_specs(lambda name, spec: functools.partial(_piece, name, spec, initializer_range, seed, ulps), specs)


def whole(shape: Sequence[int]) -> Index:
    return tuple(slice(0, size) for size in shape)


def _piece(name: str, spec: Spec, initializer_range: float, seed: int, ulps: int, index: Index) -> Float[np.ndarray, "..."]:
    bounds = [part.indices(size)[:2] for part, size in zip(index, spec.shape, strict=True)]
    values = np.ones([stop - start for start, stop in bounds], np.float32)
    if spec.init != "ones":
        flat, filled, key = values.reshape(-1), 0, zlib.crc32(name.replace(".", "/").encode())
        size = math.prod(spec.shape)
        for start, stop in _runs(bounds, spec.shape):
            while start < stop:
                block, first = divmod(start, BLOCK)
                part = _block(seed, key, block, min(BLOCK, size - block * BLOCK))[first : first + stop - start]
                flat[filled : filled + len(part)] = part
                start, filled = start + len(part), filled + len(part)
        values *= initializer_range
    for _ in range(ulps):
        values = np.nextafter(values, np.float32(np.inf))
    return values


def _runs(bounds: list[tuple[int, int]], shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where a piece's elements lie among all, in row-major order: as few ranges as there are, ascending."""
    whole_from = len(shape)  # the dimensions from here on are whole
    while whole_from and bounds[whole_from - 1] == (0, shape[whole_from - 1]):
        whole_from -= 1
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if whole_from == 0:
        yield 0, math.prod(shape)
        return
    last = whole_from - 1
    for outer in itertools.product(*(range(*bound) for bound in bounds[:last])):
        base = sum(place * stride for place, stride in zip(outer, strides, strict=False))
        yield base + bounds[last][0] * strides[last], base + bounds[last][1] * strides[last]


@functools.lru_cache(maxsize=4)
def _block(seed: int, key: int, block: int, size: int) -> Float[np.ndarray, " size"]:
    return np.random.default_rng([seed, key, block]).standard_normal(size, np.float32)
