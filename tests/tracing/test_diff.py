"""The difference of two traces: against loops over tokens."""

from dataclasses import replace

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
    for changes, what in (({"num_experts_per_tok": 3}, "top_k"), ({"num_hidden_layers": 4}, "layers")):
        with pytest.raises(ValueError, match=f"expected the same {what}"):
            diff.compare(a, RoutingTrace(about(**changes), b.text, b.choices))
    cut = b.text._replace(starts=np.array([0, 9, 30, 50]))
    with pytest.raises(ValueError, match="expected the same text"):
        diff.compare(a, RoutingTrace(b.about, cut, b.choices))


def test_other_weights_are_said():
    a, b = traces()
    assert diff.compare(a, b)["same_model"]
    assert not diff.compare(a, RoutingTrace(replace(b.about, model="other"), b.text, b.choices))["same_model"]


def test_what_only_the_second_trace_lacks_is_not_counted():
    a, _ = traces()
    experts = a.choices.experts_NLK.copy()
    experts[:3, 0] = 16
    found = diff.compare(a, RoutingTrace(a.about, a.text, a.choices._replace(experts_NLK=experts)))
    assert found["by_layer"]["tokens"] == [47, 50, 48] and found["flipped"] == 0


def test_tokens_without_a_margin_are_in_no_bin():
    a, b = traces()
    margins = a.choices.margins_NL.copy()
    margins[:7, 1] = np.nan
    found = diff.compare(RoutingTrace(a.about, a.text, a.choices._replace(margins_NL=margins)), b)
    assert sum(found["by_margin"]["tokens"]) == 141 and sum(found["by_layer"]["tokens"]) == 148


def test_margins_and_experts_that_no_router_has_are_one_line():
    a, b = traces()
    margins, experts = a.choices.margins_NL.copy(), a.choices.experts_NLK.copy()
    margins[4, 1], experts[4, 1] = -0.5, 17
    with pytest.raises(ValueError, match=r"margins: expected none below 0, got -0\.5; the trace is damaged"):
        diff.compare(RoutingTrace(a.about, a.text, a.choices._replace(margins_NL=margins)), b)
    with pytest.raises(ValueError, match=r"experts: expected 0\.\.16, got 0\.\.17; the trace is damaged"):
        diff.compare(b, RoutingTrace(a.about, a.text, a.choices._replace(experts_NLK=experts)))
