"""The difference of two traces: against loops over tokens."""

import numpy as np
import pytest

from dsv3_jax.tracing import diff
from dsv3_jax.tracing.store import Choices, RoutingTrace, Text
from oracles.traces import about


def traces(seed=0, n=50, domains=("x", "y")):
    rng = np.random.default_rng(seed)
    text = Text(rng.integers(0, 9, n).astype(np.int32), np.array([0, 10, 30, n]), np.arange(3), np.array([0, 1, 0]), domains)
    found = []
    for _ in range(2):
        experts = np.stack([rng.permuted(np.arange(5))[:2] for _ in range(n * 3)]).reshape(n, 3, 2).astype(np.uint8)
        experts[-2:, 2] = 16
        margins = (10.0 ** rng.uniform(-6, 0.2, (n, 3))).astype(np.float16)
        found.append(RoutingTrace(about(), text, Choices(experts, np.zeros((n, 3, 2)), margins, None, None)))
    return found


def test_flips_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(diff, "CHUNK", 7)
    a, b = traces()
    found = diff.compare(a, b)
    flips, margins, layers, domains, common, first = [], [], [], [], [], []
    domain_of = a.of_tokens(a.text.domain_of)
    for i in range(50):
        for layer in range(3):
            ours, theirs = (t.choices.experts_NLK[i, layer].tolist() for t in (a, b))
            if 16 in ours:
                continue
            flips.append(set(ours) != set(theirs))
            common.append(len(set(ours) & set(theirs)) / 2)
            first.append(ours[0] != theirs[0])
            margins.append(float(a.choices.margins_NL[i, layer]))
            layers.append(layer)
            domains.append(domain_of[i])
    flips, margins, layers, domains, common, first = map(np.array, (flips, margins, layers, domains, common, first))
    assert found["by_layer"]["tokens"] == [50, 50, 48]
    for layer in range(3):
        own = layers == layer
        for name, values in (("flipped", flips), ("agreement", common), ("first", first)):
            assert found["by_layer"][name][layer] == pytest.approx(values[own].mean())
    for m, name in enumerate("xy"):
        own = domains == m
        assert found["by_domain"][name] == {"tokens": own.sum(), "flipped": pytest.approx(flips[own].mean())}
    edges = found["by_margin"]["edges"]
    for low, high, n, share in zip(edges, edges[1:], found["by_margin"]["tokens"], found["by_margin"]["flipped"], strict=False):
        own = (margins >= low) & (margins < (np.inf if high is None else high))
        assert n == own.sum() and (share is None if not n else share == pytest.approx(flips[own].mean()))
    assert found["flipped"] == pytest.approx(flips.mean()) and found["agreement"] == pytest.approx(common.mean())
    rows = diff.table(found).splitlines()
    assert max(map(len, rows)) <= 100 and rows[-1].startswith("in all:")
    assert len(diff.draw(found).axes) == 3


def test_a_trace_beside_itself_has_no_flip():
    a, _ = traces()
    found = diff.compare(a, a)
    assert found["flipped"] == 0 and found["agreement"] == 1 and found["same_model"]


def test_order_alone_is_no_flip_of_the_set():
    a, _ = traces()
    b = RoutingTrace(a.about, a.text, a.choices._replace(experts_NLK=a.choices.experts_NLK[..., ::-1]))
    found = diff.compare(a, b)
    assert found["flipped"] == 0 and found["by_layer"]["first"] == [1, 1, 1]


def test_other_texts_and_other_models_are_refused():
    a, b = traces()
    other = b.text._replace(tokens_N=b.text.tokens_N + 1)
    with pytest.raises(ValueError, match="expected the same text, got other tokens"):
        diff.compare(a, RoutingTrace(b.about, other, b.choices))
    with pytest.raises(ValueError, match="expected the same n_experts, got 16 and 17"):
        diff.compare(a, RoutingTrace(about(n_routed_experts=17, n_group=1, topk_group=1), b.text, b.choices))
