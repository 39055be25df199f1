"""What a room declares of its parameters: shape, logical axes and initialiser, as plain data."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Union

import jax


class Spec(NamedTuple):
    """One parameter. `axes` names each dimension for the sharding rules; gains start at 1, matrices at N(0, std) [§4.2]."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones"] = "normal"


SpecTree = Mapping[str, Union[Spec, "SpecTree"]]


def gain(size: int, axis: str) -> Spec:
    """An RMSNorm's gain."""
    return Spec((size,), (axis,), "ones")


def stacked(tree: SpecTree, layers: int) -> SpecTree:
    """The same parameters for `layers` layers, with a leading `layers` axis to scan over."""
    return jax.tree.map(
        lambda s: Spec((layers, *s.shape), ("layers", *s.axes), s.init), tree, is_leaf=lambda s: isinstance(s, Spec)
    )
