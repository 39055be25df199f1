"""Initial parameters: any piece is that of the whole, and is drawn without it."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.model import initial
from dsv3_jax.model.initial import initial_values, whole
from dsv3_jax.model.spec import Spec

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def drawer(shape, seed=0, name="w"):
    spec = Spec(shape, tuple("abcd"[: len(shape)]))
    return initial_values({"layer": {name: spec}}, 0.5, seed)["layer"][name]


@settings(max_examples=60)
@given(SHAPES, st.integers(1, 40), st.data())
def test_a_piece_is_that_of_the_whole(shape, block, data):
    before, initial.BLOCK = initial.BLOCK, block
    initial._block.cache_clear()
    try:
        index = tuple(
            slice(*sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))) for size in shape
        )
        draw = drawer(shape)
        np.testing.assert_array_equal(draw(index), draw(whole(shape))[index])
    finally:
        initial.BLOCK = before


def test_blocks_parameters_and_seeds_have_streams_of_their_own():
    shape = (3, initial.BLOCK)
    values = drawer(shape)(whole(shape))
    others = drawer(shape, seed=1)(whole(shape)), drawer(shape, name="v")(whole(shape))
    drawn = np.stack([*values, *(row for other in others for row in other)])
    correlations = np.corrcoef(drawn)
    assert np.abs(correlations - np.eye(9)).max() < 5 / math.sqrt(initial.BLOCK)
    assert abs(values.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * values.size)


def test_an_expert_of_the_released_size_is_drawn_without_the_others(monkeypatch):
    """The whole would be 872 GB."""
    drawn = []
    block = initial._block.__wrapped__
    monkeypatch.setattr(initial, "_block", lambda *key: drawn.append(key[2]) or block(*key))
    piece = drawer((58, 256, 7168, 2048))((slice(57, 58), slice(200, 201), slice(0, 896), slice(0, 2048)))
    assert piece.shape == (1, 1, 896, 2048) and len(drawn) <= 2
