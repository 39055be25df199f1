"""Fill-in-the-middle can be undone, and cuts fall everywhere."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.fim import fill_in_middle

FIM = BEGIN, HOLE, END = 1001, 1000, 1002


def undone(ids: np.ndarray) -> np.ndarray:
    """Prefix, middle, suffix in the order of the text; written apart from the code under test."""
    values = ids.tolist()
    hole, end = values.index(HOLE), values.index(END)
    assert values[0] == BEGIN
    return np.array(values[1:hole] + values[end + 1 :] + values[hole + 1 : end], ids.dtype)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 999), max_size=30), st.integers(0, 2**32))
def test_prefix_middle_suffix_give_the_document_back(values, seed):
    ids = np.array(values, np.int32)
    mixed = fill_in_middle(ids, FIM, np.random.default_rng(seed))
    assert mixed.dtype == ids.dtype and len(mixed) == len(ids) + 3
    np.testing.assert_array_equal(undone(mixed), ids)


def test_each_pair_of_cuts_occurs_as_often_as_two_independent_uniform_ones_do():
    rng, n, draws = np.random.default_rng(0), 3, 16_000
    found = Counter(tuple(fill_in_middle(np.arange(n), FIM, rng).tolist()) for _ in range(draws))
    # Ordered pairs of n + 1 places: equal cuts have probability 1/16, different ones 2/16.
    assert len(found) == 10
    for mixed, count in found.items():
        empty_middle = mixed[-1] == END
        # Three standard deviations of a binomial count are below 110 (equal) and 126 (different).
        assert abs(count - draws * (1 if empty_middle else 2) / 16) < 130
