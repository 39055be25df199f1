"""Flips between two traces: against loops over tokens, and against rounding done for real."""

import math

import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from dsv3_jax.analysis import flips, routing

E, K, L, N = 7, 3, 2, 90


def choices(rng, n=N):
    experts = np.argsort(rng.random((n, L, E)), axis=-1)[..., :K].astype(np.uint8)
    gates = np.sort(rng.random((n, L, K)), axis=-1)[..., ::-1].astype(np.float16)
    return experts, gates


@pytest.fixture
def two():
    """The second as the first in every other token; MTP's last token has no experts in both, another in one."""
    rng = np.random.default_rng(0)
    (a, g), (b, h) = choices(rng), choices(rng)
    b[::2], h[::2] = a[::2, :, ::-1], g[::2, :, ::-1]
    a[-1, 1] = b[-1, 1] = E
    a[-2, 1] = E
    return a, g, b, h


def walk(two):
    """[(token, layer, lost ranks, moved)] of what is counted."""
    a, g, b, h = two
    rows = []
    for n in range(N):
        for layer in range(L):
            ours, theirs = a[n, layer].tolist(), b[n, layer].tolist()
            if E in ours or E in theirs:
                continue
            p = dict(zip(ours, g[n, layer].astype(float) / g[n, layer].astype(float).sum(), strict=True))
            q = dict(zip(theirs, h[n, layer].astype(float) / h[n, layer].astype(float).sum(), strict=True))
            moved = sum(abs(p.get(e, 0) - q.get(e, 0)) for e in range(E)) / 2
            rows.append((n, layer, [k for k, e in enumerate(theirs) if e not in ours], moved))
    return rows


def test_differences_are_those_of_a_loop(two, monkeypatch):
    monkeypatch.setattr(routing, "PIECE", 7 * L * K * K)
    found = flips.differences(*two, E)
    lost, counted = np.zeros((L, K), int), np.zeros((N, L), bool)
    for n, layer, ranks, moved in walk(two):
        counted[n, layer] = True
        lost[layer, ranks] += 1
        assert found.exchanged_NL[n, layer] == len(ranks)
        assert found.moved_NL[n, layer] == pytest.approx(moved, abs=5e-4)  # stored as FP16, half a step below 1
    assert (found.counted_NL == counted).all() and (found.lost_LK == lost).all()
    assert not found.exchanged_NL[~counted].any() and not found.moved_NL[~counted].any()
    assert found.exchanged_NL[counted].any() and not found.exchanged_NL[::2].any()  # order alone is no flip
    np.testing.assert_allclose(flips.kept_experts(found), 1 - lost.sum(axis=1) / (counted.sum(axis=0) * K))


def test_traces_of_other_shapes_are_refused_in_one_line(two):
    a, g, b, h = two
    with pytest.raises(ValueError, match=r"^experts: expected the reference's \(89, 2, 3\), got \(90, 2, 3\)") as error:
        flips.differences(a, g, b[1:], h[1:], E)
    assert "\n" not in str(error.value)


def test_rates_by_layer_domain_and_margin_count_what_a_loop_counts(two):
    found = flips.differences(*two, E)
    rng = np.random.default_rng(1)
    domain, margins = rng.integers(0, 4, N), (10.0 ** rng.uniform(-6, 0.5, (N, L))).astype(np.float16)
    edges = np.array([0.0, 2.0**-10, 2.0**-3])
    margins[:5, 0] = np.nan, np.inf, *edges
    by_layer, by_domain, by_margin = (np.zeros((2, n), int) for n in (L, 5, 3))
    for n, layer, ranks, _ in walk(two):
        where = [(by_layer, layer), (by_domain, domain[n])]
        if not np.isnan(margins[n, layer]):
            where.append((by_margin, [float(margins[n, layer]) >= e for e in edges].index(False) - 1
                          if float(margins[n, layer]) < edges[-1] else 2))  # fmt: skip
        for table, at in where:
            table[:, at] += [bool(ranks), 1]
    for rate, table in (
        (flips.by_layer(found), by_layer),
        (flips.by_domain(found, domain, 5), by_domain),
        (flips.by_margin(found.flipped_NL, found.counted_NL, margins, edges), by_margin),
    ):
        assert rate.hits.tolist() == table[0].tolist() and rate.of.tolist() == table[1].tolist()
    assert np.isnan(flips.by_domain(found, domain, 5).share[4])


def test_intervals_are_scipy_s_and_hold_the_share():
    hits, of = np.array([0, 1, 50, 100, 3, 0]), np.array([10, 10, 100, 100, 100_000, 0])
    low, high = flips.Rate(hits, of).interval(0.9)
    for i in range(5):
        expected = stats.binomtest(int(hits[i]), int(of[i])).proportion_ci(0.9, method="wilson")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert np.isnan([low[5], high[5]]).all()
    share = flips.Rate(hits, of).share[:5]
    assert (low[:5] <= share).all() and (share <= high[:5]).all()


def test_flips_with_depth_are_those_of_a_loop_over_tokens():
    rng = np.random.default_rng(2)
    flipped, counted = rng.random((200, 3)) < 0.3, rng.random((200, 3)) < 0.9
    flipped &= counted
    found = flips.Differences(counted, flipped.astype(np.uint8), np.zeros((200, 3)), np.zeros((3, K), int))
    depth = flips.with_depth(found)
    for i in range(3):
        before = [flipped[n, :i].any() for n in range(200)]
        assert depth.any_L[i] == pytest.approx(np.mean([flipped[n, : i + 1].any() for n in range(200)]))
        for rate, yes in ((depth.after, True), (depth.before, False)):
            own = [n for n in range(200) if before[n] == yes and counted[n, i]]
            assert (rate.hits[i], rate.of[i]) == (sum(flipped[n, i] for n in own), len(own))
    rates = [flipped[:, i].sum() / counted[:, i].sum() for i in range(3)]
    np.testing.assert_allclose(depth.independent_L, [1 - math.prod(1 - r for r in rates[: i + 1]) for i in range(3)])


def test_the_noise_of_margins_foretells_flips_between_two_experts():
    """Two experts' scores with independent normal noise: the flips counted are those expected, at every margin."""
    rng = np.random.default_rng(3)
    n, noise = 60_000, 3e-3
    margins = np.abs(rng.normal(0, 2e-2, (n, 1)))
    moved = margins + rng.normal(0, noise, (n, 1))
    flipped = moved < 0
    found = flips.Differences(np.ones((n, 1), bool), flipped.astype(np.uint8), np.zeros((n, 1)), np.zeros((1, K), int))
    foretold = flips.foretold(np.abs(moved).astype(np.float16), margins.astype(np.float16), found)
    # Six standard errors of a share of n, and of the noise's own sample of n / 2.
    assert foretold.share_L[0] == pytest.approx(flipped.mean(), abs=6 * math.sqrt(flipped.mean() / n))
    rate = flips.by_margin(found.flipped_NL, found.counted_NL, margins.astype(np.float16))
    enough = rate.of > 100
    limit = 6 * np.sqrt(0.25 / rate.of[enough])
    assert (np.abs(foretold.share_B[enough] - rate.share[enough]) < limit).all() and enough.sum() >= 5
    assert foretold.noise_L[0] == pytest.approx(noise * stats.norm.ppf(0.75), rel=0.03)


def test_without_a_margin_nothing_is_foretold():
    nan = np.full((4, 1), np.nan, np.float16)
    found = flips.Differences(np.ones((4, 1), bool), np.zeros((4, 1), np.uint8), np.zeros((4, 1)), np.zeros((1, K), int))
    assert all(np.isnan(part).all() for part in flips.foretold(nan, nan, found))
    assert np.isnan(flips.ties_by_rounding(nan[:, 0], [0.1])).all()


def test_ties_by_rounding_are_those_that_bf16_makes_among_scores_from_a_half_to_one():
    rng = np.random.default_rng(4)
    scores = rng.uniform(0.5, 1, (200_000, 4)).astype(np.float32)
    k, bf16 = 2, ml_dtypes.bfloat16
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)
    rounded = np.argsort(-scores.astype(bf16).astype(np.float32), axis=-1, kind="stable")  # ties to the lower number
    flipped = (np.sort(order[:, :k]) != np.sort(rounded[:, :k])).any(axis=-1)
    found = flips.ties_by_rounding(ranked[:, k - 1] - ranked[:, k], [2.0**-8, 1e-9])
    # Four standard errors; three scores in one step are rarer than that among four.
    assert found[0] == pytest.approx(flipped.mean(), abs=4 * math.sqrt(flipped.mean() / len(scores))) and found[1] < 1e-6
