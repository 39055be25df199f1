"""What the implementations of attention over a cache of latents have in common: how they are called."""

from typing import Any, Protocol

import jax


class Attend(Protocol):
    def __call__(
        self,
        q_BNK: jax.Array,
        cache_PSK: jax.Array,
        table_BM: jax.Array,
        length_B: jax.Array,
        *,
        heads: int,
        latent: int,
        scale: float,
        splits: int,
        dtype: Any,
        name: str,
        interpret: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Each split's part [X, B, N, C] in `dtype` and log-sum-exp [X, B, N] in float32; zeros and -inf where it sees no row.

        Of the N = T * heads queries of a sequence, the n-th is n // heads of T. `table_BM`: which of the P pages of S rows are
        the sequence's, in order; query t sees the first length - T + t + 1 rows, at least 0 and at most all.
        """
