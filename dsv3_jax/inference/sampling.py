"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p and min-p, in this order.

Every draw has a key of its own, made of the seed, the sequence and the position: what a sequence continues with depends on
neither its neighbours in the batch nor on how many positions a step computes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sampling(NamedTuple):
    """How to draw. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 leave everything in.

    top_k: the k most probable tokens. top_p: the fewest most probable ones whose probabilities reach p. min_p: those at least
    min_p times as probable as the most probable one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError, one line, for a number out of its range."""
    bounds = {
        "temperature": (sampling.temperature >= 0, "0 or more"),
        "top_k": (sampling.top_k >= 0, "0 or more"),
        "top_p": (0 < sampling.top_p <= 1, "0 < top_p <= 1"),
        "min_p": (0 <= sampling.min_p <= 1, "0..1"),
        "seed": (0 <= sampling.seed < 2**32, "0..2^32 - 1"),
    }
    for name, (ok, wanted) in bounds.items():
        if not ok:
            raise ValueError(f"{name}: expected {wanted}, got {getattr(sampling, name)}")


def filtered(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """Log-probabilities, up to a constant, of what may be drawn; -inf for what may not. Not for greedy."""
    # From the largest down, so that no temperature, however small, makes them infinite.
    logits = logits.astype(jnp.float32)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        # Of equals at the edge the lower ids stay, as many as fit.
        above, equal = logits > least, logits == least
        room = sampling.top_k - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
        logits = jnp.where(above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room)), logits, -jnp.inf)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1, stable=True)
        ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked  # a token stays if those before it do not reach p
        kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before < sampling.top_p, axis=-1, inplace=False)
        logits = jnp.where(kept, logits, -jnp.inf)
    if sampling.min_p > 0:
        logits = jnp.where(logits >= jnp.log(jnp.float32(sampling.min_p)), logits, -jnp.inf)
    return logits


def keys_at(sampling_seed: Array, sequence_B: Int[Array, " B"], position_B: Int[Array, " B"]) -> Array:
    """A key for each sequence at a position."""
    key = jax.random.key(sampling_seed)
    return jax.vmap(lambda s, p: jax.random.fold_in(jax.random.fold_in(key, s), p))(sequence_B, position_B)


def draw(logits_BV: Float[Array, "B V"], position_B: Int[Array, " B"], seed: Array, sampling: Sampling) -> Int[Array, " B"]:
    """The token at `position` of each sequence. Greedy takes the largest logit, the lowest id of equals."""
    if sampling.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    sequence_B = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)
    keys = keys_at(seed, sequence_B, position_B)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits_BV, sampling)).astype(jnp.int32)
