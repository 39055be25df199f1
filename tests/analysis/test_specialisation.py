"""Specialisation and pairs of experts against loops; what chance alone does is not called a specialist."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dsv3_jax.analysis import routing
from dsv3_jax.analysis.metrics import relative_load
from dsv3_jax.analysis.specialisation import (
    coactivation,
    information_test,
    label_lift,
    label_load,
    mutual_information,
    specialists,
    transitions,
)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(routing, "PIECE", 50)


def random_experts(rng, n_tokens, n_experts, top_k, none=0.0, dtype=np.uint8):
    experts = np.argsort(rng.random((n_tokens, n_experts)), axis=-1)[:, :top_k]
    return np.where(rng.random(experts.shape) < none, n_experts + 1, experts).astype(dtype)


@st.composite
def labelled(draw):
    """(experts [N, K], labels [N], n_experts, n_labels), of few sizes; every piece is small."""
    n_experts, n_labels, n_tokens = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    none = draw(st.sampled_from([0.0, 0.3, 1.0]))
    experts = random_experts(rng, n_tokens, n_experts, draw(st.integers(1, n_experts)), none)
    return experts, rng.integers(0, n_labels, n_tokens), n_experts, n_labels


# --- labels ---


@given(labelled())
def test_load_lift_and_information_follow_their_definitions(case):
    experts, labels, n_experts, n_labels = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "PIECE", 50)
        found = label_load(experts, labels, n_experts, n_labels)
    pairs = [(int(m), int(e)) for ids, m in zip(experts, labels, strict=True) for e in ids if e < n_experts]
    tokens = [int(m) for ids, m in zip(experts, labels, strict=True) if (ids < n_experts).any()]
    assert found.load_ME.tolist() == [[pairs.count((m, e)) for e in range(n_experts)] for m in range(n_labels)]
    assert found.tokens_M.tolist() == [tokens.count(m) for m in range(n_labels)]
    lift, bits = label_lift(found), 0.0
    for m, e in itertools.product(range(n_labels), range(n_experts)):
        of_e, of_m = [p[0] for p in pairs if p[1] == e], [p[1] for p in pairs if p[0] == m]
        if of_e and m in tokens:
            np.testing.assert_allclose(lift[m, e], of_e.count(m) / len(of_e) / (tokens.count(m) / len(tokens)), rtol=1e-12)
        else:
            assert np.isnan(lift[m, e])
        if (m, e) in pairs:
            joint = pairs.count((m, e)) / len(pairs)
            bits += joint * math.log2(joint * len(pairs) ** 2 / len(of_e) / len(of_m))
    assert mutual_information(found.load_ME) == pytest.approx(bits, abs=1e-12)


def test_the_lift_times_balance_is_the_reports_relative_load_where_experts_are_balanced():
    found = label_load(np.array([[0], [0], [1], [1]]), np.array([0, 0, 0, 1]), 2, 2)
    np.testing.assert_allclose(label_lift(found), [[4 / 3, 2 / 3], [0, 2]])
    np.testing.assert_allclose(relative_load(found.load_ME), [[4 / 3, 2 / 3], [0, 2]])


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="labels: expected 0 to 1, got 0 to 2"):
        label_load(np.zeros((2, 1), int), np.array([0, 2]), 1, 2)


def test_an_expert_a_label_says_log2_of_the_labels_and_one_label_says_nothing():
    labels = np.repeat(np.arange(4), 5)
    assert mutual_information(label_load(labels[:, None], labels, 4, 4).load_ME) == pytest.approx(2, abs=1e-12)
    assert mutual_information(label_load(labels[:, None], np.zeros_like(labels), 4, 1).load_ME) == 0
    assert mutual_information(np.zeros((2, 3), int)) == 0


@pytest.mark.parametrize("by_document", [False, True])
def test_chance_is_every_permutation_of_the_labels_of_tokens_or_documents_that_chose_an_expert(by_document):
    lengths = [1, 3, 1, 1, 2, 2, 1] if by_document else [1] * 7
    documents = np.repeat(np.arange(7), lengths)
    experts = random_experts(np.random.default_rng(6), len(documents), 3, 2)
    experts[:, 0] = np.where(documents < 3, 0, experts[:, 0])
    experts[documents > 4] = 9  # of none, and all of one label: these stay what they are
    by_unit = np.array([1, 0, 1, 0, 0, 0, 0])
    experts[experts[:, 0] == experts[:, 1], 1] = 4
    every = []
    for order in itertools.permutations(range(5)):
        moved = by_unit.copy()
        moved[:5] = by_unit[list(order)]
        every.append(label_load(experts, moved[documents], 3, 2))
    bits = [mutual_information(found.load_ME) for found in every]
    given_documents, labels = documents * 11 if by_document else None, 5 + 2 * by_unit[documents]
    found = information_test(
        experts, labels, 3, permutations=2000, rng=np.random.default_rng(0), levels=(0.0, 1.0), documents_N=given_documents
    )
    assert found.bits == pytest.approx(bits[0], abs=1e-12)
    np.testing.assert_allclose(found.null_quantiles, [min(bits), max(bits)], atol=1e-12)
    # 5 standard errors of a mean of 2,000, and 1 in 2,000 for the observed one that p counts too
    assert found.null_mean == pytest.approx(np.mean(bits), abs=5 * np.std(bits) / 2000**0.5)
    reach = np.mean(np.array(bits) >= bits[0] - 1e-9)
    assert found.p_value == pytest.approx(reach, abs=5 * (reach * (1 - reach) / 2000) ** 0.5 + 1e-3)
    if by_document:
        shares = np.array([each.load_ME / each.tokens_M[:, None] for each in every])
        rng = np.random.default_rng(1)
        for s in specialists(experts, labels, 3, level=1.0, documents_N=documents, permutations=2000, rng=rng):
            mine = shares[:, (s.label - 5) // 2, s.expert]
            reach = np.mean(mine >= mine[0] - 1e-9)
            assert s.p_value == pytest.approx(reach, abs=5 * (reach * (1 - reach) / 2000) ** 0.5 + 1e-3)


@pytest.mark.parametrize("by_document", [False, True])
def test_chance_reaches_what_it_equals_in_whatever_order_it_is_summed(by_document):
    """Each token, or document, has an expert to itself: a permutation reorders the table's columns, and all say the same."""
    experts, labels = np.arange(70)[:, None], np.arange(70) % 7 // 2
    documents = np.repeat(np.arange(70), 3) if by_document else None
    if by_document:
        experts, labels = experts[documents], labels[documents]
    found = information_test(experts, labels, 70, permutations=200, rng=np.random.default_rng(0), documents_N=documents)
    assert found.p_value == 1 and found.null_mean == pytest.approx(found.bits, rel=1e-12)
    assert found.bits == pytest.approx(stats.entropy(np.bincount(labels), base=2), rel=1e-12)


@pytest.mark.parametrize("by_document", [False, True])
def test_p_values_of_independent_labels_are_uniform(by_document):
    rng, p_values, of_a_pair = np.random.default_rng(1), [], []
    for _ in range(200):
        documents = np.repeat(np.arange(12), rng.integers(3, 8, 12))
        labels = rng.permutation(np.arange(12) % 3)[documents] if by_document else rng.integers(0, 3, len(documents))
        experts = random_experts(rng, len(documents), 6, 2)
        if by_document:  # tokens of a document choose alike, whatever its label
            alike = rng.random(len(documents)) < 0.5
            experts = np.where(alike[:, None], documents[:, None] * np.array([[1, 5]]) % 6, experts).astype(np.uint8)
            every = specialists(experts, labels, 6, level=1.0, least_lift=0.0, documents_N=documents, permutations=39, rng=rng)
            of_a_pair += [s.p_value for s in every if (s.expert, s.label) == (1, 0)]
        test = information_test(experts, labels, 6, permutations=39, rng=rng, documents_N=documents if by_document else None)
        p_values.append(test.p_value)
    # Their grid is 1/40, which moves the distribution function by as much. 1.63 is the 1 % point of Kolmogorov's D * sqrt(n).
    assert stats.kstest(p_values, "uniform").statistic < 1.63 / 200**0.5 + 1 / 40
    if by_document:
        assert len(of_a_pair) == 200 and stats.kstest(of_a_pair, "uniform").statistic < 1.63 / 200**0.5 + 1 / 40


def test_a_planted_dependence_is_found_and_p_is_one_over_one_more_than_the_permutations():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 300)
    experts = random_experts(rng, 300, 8, 2)
    experts[:, 0] = np.where((labels == 1) & (rng.random(300) < 0.5), 7, experts[:, 0] % 4)
    experts[:, 1] = 4 + experts[:, 1] % 3
    found = information_test(experts, labels, 8, permutations=99, rng=np.random.default_rng(0))
    assert found.p_value == 0.01 and found.bits > 5 * found.null_mean
    again = information_test(experts, labels, 8, permutations=99, rng=np.random.default_rng(0))
    assert again.null_mean == found.null_mean
    with pytest.raises(ValueError, match="at least 1, got 0"):
        information_test(experts, labels, 8, permutations=0, rng=rng)


# --- specialists ---


def test_a_p_value_by_token_is_that_of_all_permutations():
    experts, labels = np.array([[0, 1], [0, 2], [1, 2], [5, 0], [1, 0], [2, 9], [9, 9]]), np.array([0, 0, 1, 1, 1, 0, 1])
    observed = label_load(experts, labels, 3, 2)
    reached, every = np.zeros((2, 3)), list(itertools.permutations(range(6)))
    for order in every:
        reached += label_load(experts[:6], labels[list(order)], 3, 2).load_ME >= observed.load_ME
    found = specialists(experts, labels, 3, level=1.0)
    assert {(s.label, s.expert) for s in found} == {(int(m), int(e)) for m, e in np.argwhere(label_lift(observed) >= 1)}
    for s in found:
        if s.lift > 1:
            assert s.p_value == pytest.approx(reached[s.label, s.expert] / len(every), rel=1e-9)
        assert s.tokens == observed.load_ME[s.label, s.expert]


def test_adjusted_p_values_are_benjamini_and_hochbergs_over_all_pairs():
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(20), 5)
    experts, labels = random_experts(rng, 100, 4, 2), rng.integers(0, 3, 20)[documents]
    experts[(documents % 2 == 0), 0] = 3
    experts[:, 1] %= 3
    found = specialists(
        experts, labels, 4, level=1.0, least_lift=0.0, documents_N=documents, permutations=50, rng=np.random.default_rng(0)
    )
    assert len(found) == 12  # every pair
    ranked = sorted(s.p_value for s in found)
    for s in found:
        expected = min(p * 12 / (i + 1) for i, p in enumerate(ranked) if p >= s.p_value)
        assert s.adjusted == pytest.approx(min(1, expected), rel=1e-12)
    assert [s.adjusted for s in found] == sorted(s.adjusted for s in found)
    assert all(round(s.p_value * 51, 9).is_integer() and 1 <= round(s.p_value * 51) <= 51 for s in found)


def test_a_planted_specialist_is_found_and_nothing_else(small_pieces):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 4, 4000)
    experts = random_experts(rng, 4000, 16, 2)
    experts += experts >= 5  # expert 5 is left for the plant
    take = (labels == 2) & (rng.random(4000) < 0.2)
    experts[take, 1] = 5
    (only,) = specialists(experts, 100 * labels, 17)
    assert (only.expert, only.label, only.tokens) == (5, 200, take.sum())
    assert only.lift == pytest.approx(4000 / np.sum(labels == 2), rel=1e-12)
    assert specialists(experts, 100 * labels, 17, least_lift=5.0) == []


def test_chance_is_rarely_called_a_specialist():
    lists = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        experts, labels = random_experts(rng, 300, 16, 2), rng.integers(0, 8, 300)
        observed = label_load(experts, labels, 16, 8)
        assert label_lift(observed).max() > 1.5  # it looks like one
        lists.append(specialists(experts, labels, 16))
    # At most 5 % of seeds in expectation: 3 of 60, and more than 8 with a probability below 1 %.
    assert sum(map(bool, lists)) <= 8


def by_author(seed, plant):
    """40 documents of 25 tokens in 4 domains; each document has favourite experts of its own, by chance."""
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(40), 25)
    labels = rng.permutation(np.arange(40) % 4)[documents]
    favours = np.exp(1.5 * rng.standard_normal((40, 12)))
    scores = favours[documents] * rng.random((1000, 12))
    experts = np.argsort(-scores, axis=1)[:, :2]
    experts += experts >= 6
    if plant:
        experts[(labels == 1) & (rng.random(1000) < 0.5), 1] = 6
    return experts.astype(np.uint16), labels, documents


@pytest.mark.parametrize("seed", range(4))
def test_what_documents_have_in_common_by_chance_is_no_domains_specialist(seed):
    experts, labels, documents = by_author(seed, plant=False)
    assert len(specialists(experts, labels, 13)) > 3  # tokens as witnesses, which they are not
    rng = np.random.default_rng(0)
    assert specialists(experts, labels, 13, documents_N=documents, rng=rng) == []
    naive = information_test(experts, labels, 13, permutations=49, rng=rng)
    fair = information_test(experts, labels, 13, permutations=49, rng=rng, documents_N=documents)
    assert naive.p_value == 0.02 and fair.p_value > 0.02 and fair.bits == naive.bits


def test_a_planted_specialist_is_found_among_documents():
    experts, labels, documents = by_author(0, plant=True)
    found = specialists(experts, labels, 13, documents_N=1000 - documents, rng=np.random.default_rng(0))
    assert [(s.expert, s.label) for s in found] == [(6, 1)]
    # 52 pairs: the smallest number of permutations by which a single one survives among them
    assert found[0].p_value == 1 / (1 + math.ceil(52 / 0.05))


def test_long_documents_do_not_make_a_domain_a_specialist_of_everything():
    rng = np.random.default_rng(5)
    lengths = np.where(np.arange(24) < 12, 10, 40)
    documents = np.repeat(np.arange(24), lengths)
    experts = random_experts(rng, len(documents), 6, 2)
    found = specialists(experts, (documents >= 12).astype(int), 6, documents_N=documents, rng=rng)
    assert found == []


def test_documents_need_one_label_each_and_a_generator():
    experts, labels = np.zeros((4, 1), int), np.array([0, 1, 1, 1])
    with pytest.raises(ValueError, match="expected a generator"):
        specialists(experts, labels, 2, documents_N=np.array([0, 1, 1, 1]))
    with pytest.raises(ValueError, match="expected one label a document, got several"):
        specialists(experts, labels, 2, documents_N=np.array([0, 0, 1, 1]), rng=np.random.default_rng(0))


@pytest.mark.parametrize("by_document", [False, True])
def test_no_tokens_and_no_choices_are_no_specialists_and_no_information(by_document):
    for n in (0, 3):
        experts, labels = np.full((n, 2), 4), np.zeros(n, int)
        documents, rng = labels if by_document else None, np.random.default_rng(0)
        assert specialists(experts, labels, 4, documents_N=documents, rng=rng) == []
        found = information_test(experts, labels, 4, permutations=3, rng=rng, documents_N=documents)
        assert (found.bits, found.null_mean, found.p_value) == (0, 0, 1)


# --- pairs of experts ---


@given(labelled())
def test_pairs_count_tokens_that_chose_both(case):
    experts, _, n_experts, _ = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "PIECE", 50)
        found = coactivation(experts, n_experts)
    sets = [set(ids[ids < n_experts].tolist()) for ids in experts]
    expected = [[sum({i, j} <= s for s in sets) for j in range(n_experts)] for i in range(n_experts)]
    assert found.counts.tolist() == expected
    assert np.isnan(np.diagonal(found.lift)).all()
    np.testing.assert_array_equal(np.diagonal(found.expected), np.diagonal(found.counts))


@pytest.mark.parametrize("sizes", [[2], [3], [1, 3], [2, 4], [5]])
def test_lift_is_one_where_sets_are_as_likely_as_the_product_of_their_weights(sizes):
    weights, tokens = [1, 5, 2, 1, 3], []
    for size in sizes:
        for chosen in itertools.combinations(range(5), size):
            copies = math.prod(weights[e] for e in chosen) * (3 if size == 1 else 1)
            tokens += [list(chosen) + [6] * (max(sizes) - size)] * copies
    found = coactivation(np.array(tokens), 6)  # and an expert that is never chosen
    apart = ~np.eye(6, dtype=bool)
    apart[5] = apart[:, 5] = False
    # Loads are fitted to 1e-12 of the tokens; the rarest pair is some 100 times rarer.
    both = (found.counts > 0) & ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(found.lift[apart], 1, rtol=1e-9)
    assert (both == apart).all()
    assert np.isnan(found.lift[5]).all() and (found.expected[5] == 0).all()


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 10**6), st.floats(0.0, 3.0))
def test_expected_pairs_add_up_to_the_places_beside_each_expert(n_experts, top_k, seed, skew):
    rng, top_k = np.random.default_rng(seed), min(top_k, n_experts)
    scores = rng.gumbel(size=(60, n_experts)) + skew * rng.standard_normal((1, n_experts))
    experts = np.argsort(-scores, axis=1)[:, :top_k]
    found = coactivation(experts, n_experts)
    load = np.diagonal(found.counts)
    np.testing.assert_allclose(found.expected.sum(axis=1) - load, (top_k - 1) * load, atol=1e-6)
    assert (found.expected <= np.minimum(load[:, None], load[None]) + 1e-6).all()
    assert (found.expected >= load[:, None] + load[None] - 60 - 1e-6).all()


def test_beside_an_expert_that_all_chose_the_others_have_no_choice():
    found = coactivation(np.array([[0, 1]] * 30 + [[0, 2]] * 10), 3)
    np.testing.assert_allclose(found.expected, [[40, 30, 10], [30, 30, 0], [10, 0, 10]], rtol=1e-9)
    np.testing.assert_allclose(found.lift, [[np.nan, 1, 1], [1, np.nan, np.nan], [1, np.nan, np.nan]], rtol=1e-9)


def test_experts_that_go_together_have_lift_and_balanced_ones_the_known_chance():
    pairs = np.array([[0, 1], [2, 3], [4, 5]] * 10)
    found = coactivation(pairs, 6)
    # Of 6 equal experts another one is the second with 1/5: 10 tokens chose 0, so 2 are expected with 1.
    np.testing.assert_allclose(found.expected[0], [10, 2, 2, 2, 2, 2], rtol=1e-9)
    np.testing.assert_allclose(found.lift[0, 1:], [5, 0, 0, 0, 0], rtol=1e-9)


@given(st.integers(0, 10**6), st.integers(0, 30), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.4, 1.0]))
def test_transitions_count_pairs_of_choices_in_successive_layers(seed, n, n_layers, top_k, none):
    rng = np.random.default_rng(seed)
    experts = random_experts(rng, n * n_layers, 4, top_k, none).reshape(n, n_layers, top_k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "PIECE", 50)
        found = transitions(experts, 4)
    assert found.counts.shape == (n_layers - 1, 4, 4)
    for layer in range(n_layers - 1):
        pairs = [(int(a), int(b)) for t in experts for a, b in itertools.product(t[layer], t[layer + 1]) if a < 4 and b < 4]
        for i, j in itertools.product(range(4), range(4)):
            assert found.counts[layer, i, j] == pairs.count((i, j))
            chance = sum(a == i for a, _ in pairs) * sum(b == j for _, b in pairs) / max(1, len(pairs))
            assert found.expected[layer, i, j] == pytest.approx(chance, abs=1e-9)
            lift = pairs.count((i, j)) / chance if chance else np.nan
            np.testing.assert_allclose(found.lift[layer, i, j], lift, rtol=1e-12)
