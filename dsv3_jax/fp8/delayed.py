"""Delayed scaling, the alternative that the report decided against [§3.3.2]: scales from the magnitudes of earlier steps.

An operand that outgrows its history saturates. The history lies beside the weight, in the parameter tree that the model sees;
what the operands' magnitudes were comes out of the backward pass as the history's "gradient".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Amax(NamedTuple):
    """Largest magnitudes of a linear operation's operands; None: not delayed."""

    x: Float[Array, ""] | None = None
    weight: Float[Array, ""] | None = None
    gradient: Float[Array, ""] | None = None


NOT_DELAYED = Amax()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Delayed:
    """A weight and the magnitudes that its operation's operands had: `amax` [*layers, 3, steps], the last step first."""

    weight: Any
    amax: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def astype(self, dtype: Any) -> "Delayed":
        return replace(self, weight=self.weight.astype(dtype))

    def reshape(self, *shape: int) -> "Delayed":
        return replace(self, weight=self.weight.reshape(*shape))


def parted(weight: Any) -> tuple[Any, Any]:
    """A weight and its history, if it has one."""
    return (weight.weight, weight.amax) if isinstance(weight, Delayed) else (weight, None)


def largest(history: Array | None) -> Amax:
    return NOT_DELAYED if history is None else Amax(*history.max(axis=-1))


def magnitude(x: Array) -> Array:
    return jnp.abs(x).max().astype(jnp.float32)


def observed(history: Array | None, amax_x: Array | None, weight: Array, gradient: Array) -> Array | None:
    """The history's gradient: this step's magnitudes in its first column. x's as it was before it was rounded."""
    if history is None:
        return None
    assert amax_x is not None
    return jnp.zeros_like(history).at[:, 0].set(jnp.stack([amax_x, magnitude(weight), magnitude(gradient)]))


def first_history(params: Any, steps: int, is_linear: Callable[[Any], bool]) -> Any:
    """Zeros for every weight of a parameter tree whose path `is_linear`, None for the others."""

    def zeros(path: Any, weight: Any) -> Array | None:
        return jnp.zeros((weight.shape[0], 3, steps), jnp.float32) if is_linear(path) else None

    return jax.tree_util.tree_map_with_path(zeros, params)


def beside(params: Any, history: Any) -> Any:
    """Every weight with its history."""
    if history is None:
        return params
    return jax.tree.map(lambda weight, amax: weight if amax is None else Delayed(weight, amax), params, history)


def apart(tree: Any) -> tuple[Any, Any]:
    """What `beside` put together, or the gradients of it: weights, and histories or this step's magnitudes."""

    def is_delayed(leaf: Any) -> bool:
        return isinstance(leaf, Delayed)

    weights, amax = (jax.tree.map(lambda leaf, i=i: parted(leaf)[i], tree, is_leaf=is_delayed) for i in range(2))
    return weights, amax


def advanced(history: Any, now: Any) -> Any:
    """A step later."""
    return jax.tree.map(lambda old, new: jnp.concatenate([new[..., :1], old[..., :-1]], axis=-1), history, now)
