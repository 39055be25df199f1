"""Exponential moving average of the parameters [§3.2.3], held in NumPy on the host, off the device.

The average is debiased as Adam's moments are: after n updates, parameters seen k updates ago weigh decay^k, normalised to
sum to one. So it starts as the first parameters it is shown and never remembers the initialisation.
"""

from typing import Any, NamedTuple

import jax
import numpy as np


class Ema(NamedTuple):
    average: Any  # tree of float32 NumPy arrays, like the parameters
    n_updates: int


def init_ema(params: Any) -> Ema:
    """`params`: tree of arrays (or shapes) to mirror; the zeros have no weight in any later average."""
    return Ema(jax.tree.map(lambda p: np.zeros(p.shape, np.float32), params), 0)


def update_ema(ema: Ema, params: Any, decay: float) -> Ema:
    """The average with `params` (a tree of arrays) taken in. Writes into `ema.average`, which must not be used afterwards."""
    n_updates = ema.n_updates + 1
    weight = np.float32((1 - decay) / (1 - decay**n_updates))

    def take_in(average: np.ndarray, p: Any) -> np.ndarray:
        difference = np.asarray(p).astype(np.float32) - average
        difference *= weight
        average += difference
        return average

    return Ema(jax.tree.map(take_in, ema.average, params), n_updates)
