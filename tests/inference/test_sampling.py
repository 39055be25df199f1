"""What may be drawn, how often it is drawn, and by which key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.inference.sampling import GREEDY, Sampling, check_sampling, draw, filtered
from oracles.chi_square import rejected

SEED = jnp.uint32(5)


def kept_by_reference(logits, sampling):
    """Probabilities after the filters, one after the other, in float64; the lower id is the more probable of equals."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weight = np.exp((np.asarray(logits, np.float64) - max(logits)) / sampling.temperature)
    if sampling.top_k:
        order = order[: sampling.top_k]
    if sampling.top_p < 1:
        ranked = np.array([weight[i] for i in order]) / sum(weight[i] for i in order)
        order = [
            i for i, before in zip(order, np.concatenate([[0], np.cumsum(ranked)[:-1]]), strict=True) if before < sampling.top_p
        ]
    order = [i for i in order if weight[i] >= sampling.min_p]
    result = np.zeros(len(logits))
    result[order] = weight[order] / weight[order].sum()
    return result


# Quarters of a logit with many equals. Where the numbers p and min_p meet a sum of such exponentials, rounding decides, so they
# are no such sums.
quarters = st.lists(st.integers(-12, 12), min_size=2, max_size=9).map(lambda ns: [n / 4 for n in ns])
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([1.0, 0.013, 0.317, 0.613, 0.911, 0.9973]),
    min_p=st.sampled_from([0.0, 0.0171, 0.3313, 1.0]),
)


@settings(max_examples=40)
@given(quarters, samplings)
def test_filters_keep_what_the_reference_keeps(logits, sampling):
    # of one length, so that few programs are compiled: what is added is never drawn
    padded = np.array(logits + [-1e4] * (9 - len(logits)), np.float32)
    expected = kept_by_reference(padded, sampling)
    got = np.asarray(jax.nn.softmax(filtered(jnp.asarray(padded), sampling)))
    assert ((got > 0) == (expected > 0)).all()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def support(logits, **how):
    return np.flatnonzero(np.isfinite(np.asarray(filtered(jnp.array(logits, jnp.float32), Sampling(1.0, **how))))).tolist()


def test_of_equals_at_the_edge_the_lower_ids_stay():
    assert support([1, 3, 2, 2, 2], top_k=2) == [1, 2]
    assert support([0, 0, 0, 0], top_k=3) == [0, 1, 2]
    assert support([0, 0, 0, 0], top_p=0.5) == [0, 1] and support([0, 0, 0, 0], top_p=0.51) == [0, 1, 2]


def test_the_edges_of_every_filter():
    logits = [2.0, 1.0, 0.0, -1.0]
    assert (
        support(logits) == support(logits, top_k=4) == support(logits, top_k=99) == support(logits, min_p=1e-9) == [0, 1, 2, 3]
    )
    assert support(logits, top_k=1) == support(logits, top_p=1e-9) == support(logits, min_p=1.0) == [0]
    assert support([2.0, 2.0, 0.0], min_p=1.0) == [0, 1]


def test_top_k_comes_before_top_p_and_top_p_before_min_p():
    half = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the two most probable the first has 4/7; of all it has 0.4, less than 0.5.
    assert support(half, top_p=0.5) == [0, 1] and support(half, top_k=2, top_p=0.5) == [0]
    assert support(half, top_p=0.85, min_p=0.6) == [0, 1]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_the_smallest_temperatures_are_greedy_and_finite(temperature):
    logits = jnp.array([[3.0, 90.0, -4.0], [0.0, -1e30, 1e-3]], jnp.float32)
    probabilities = np.asarray(jax.nn.softmax(filtered(logits, Sampling(temperature))))
    np.testing.assert_array_equal(probabilities, [[0, 1, 0], [0, 0, 1]])


def test_greedy_takes_the_lowest_of_the_largest():
    logits = jnp.array([[0.0, 2.0, 2.0], [-1.0, -3.0, -1.0]])
    assert draw(logits, jnp.zeros(2, jnp.int32), SEED, GREEDY).tolist() == [1, 0]


LOGITS = np.array([1.5, 0.0, 0.5, -1.0, 1.5, 0.7])


@pytest.mark.parametrize("sampling", [Sampling(0.5), Sampling(1.3, top_k=4), Sampling(1.0, top_p=0.8, min_p=0.3)])
def test_frequencies_are_the_filtered_probabilities(sampling):
    """Over sequences, and over positions of one sequence."""
    n = 6000
    logits_NV, expected = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (n, 1)), kept_by_reference(LOGITS, sampling)
    over_sequences = draw(logits_NV, jnp.zeros(n, jnp.int32), SEED, sampling)
    one = jax.vmap(lambda position: draw(logits_NV[:1], position[None], SEED, sampling)[0])
    over_positions = one(jnp.arange(n, dtype=jnp.int32))
    unlike = kept_by_reference(LOGITS, sampling._replace(temperature=1.25 * sampling.temperature))
    for tokens in (over_sequences, over_positions):
        counts = np.bincount(tokens, minlength=len(LOGITS))
        assert not rejected(counts, expected) and rejected(counts, unlike)


def test_a_draw_depends_on_seed_sequence_and_position_and_on_nothing_else():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((40, 50)), jnp.float32)
    position = jnp.arange(40, dtype=jnp.int32)
    sampling = Sampling(1.0)
    first = draw(logits, position, SEED, sampling)
    assert (draw(logits, position, SEED, sampling) == first).all()
    assert (draw(logits[:7], position[:7], SEED, sampling) == first[:7]).all()
    assert (draw(logits, position, jnp.uint32(6), sampling) != first).sum() > 20
    assert (draw(logits, position + 1, SEED, sampling) != first).sum() > 20
    same = draw(jnp.tile(logits[:1], (40, 1)), jnp.zeros(40, jnp.int32), SEED, sampling)
    assert len(set(same.tolist())) > 5  # equal logits, other sequences


@pytest.mark.parametrize(
    ("name", "bad"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.01),
     ("top_p", float("nan")), ("min_p", -0.1), ("min_p", 1.1), ("seed", -1), ("seed", 2**32)],
)  # fmt: skip
def test_a_number_out_of_range_is_named_in_one_line(name, bad):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {bad}$"):
        check_sampling(Sampling(**{name: bad}))


def test_numbers_at_the_edge_of_their_range_pass():
    check_sampling(GREEDY)
    check_sampling(Sampling(0.0, 0, 1.0, 1.0, 2**32 - 1))
    check_sampling(Sampling(100.0, 10**6, 1e-9, 0.0, 0))
