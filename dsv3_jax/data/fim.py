"""Fill-in-the-middle in prefix-suffix-middle order [§4.1], applied to single documents before they are packed."""

import numpy as np
from jaxtyping import Integer


def fill_in_middle(
    ids: Integer[np.ndarray, "T"], fim: tuple[int, int, int], rng: np.random.Generator
) -> Integer[np.ndarray, "T3"]:
    """`begin prefix hole suffix end middle`, with begin, hole and end from `fim`.

    The two cuts are uniform over the places between tokens (both ends included), independent of each other: any of the
    three parts may be empty. Cutting between tokens keeps the documents tokenised once and for all.
    """
    first, second = sorted(rng.integers(0, len(ids) + 1, 2).tolist())
    begin, hole, end = np.array(fim, ids.dtype)[:, None]
    return np.concatenate([begin, ids[:first], hole, ids[second:], end, ids[first:second]])
