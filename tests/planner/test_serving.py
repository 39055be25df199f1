"""The published decode bound, and that it scales as its formula."""

import pytest

from dsv3_jax.planner.serving import decode_bound, dollars_per_million, experts_reached
from dsv3_jax.presets import preset


def test_the_published_bound_of_decoding():
    bound = decode_bound(tokens=32, experts=9, hidden=7000, layers=61, bytes_per_second=50e9)
    assert bound.exchange * 1e6 == pytest.approx(120.96, abs=0.005)
    assert bound.seconds * 1e3 == pytest.approx(14.76, abs=0.005)
    assert int(bound.tokens_per_second) == 67


def test_with_the_exact_hidden_size_it_is_slower_by_its_share():
    exact, rounded = (decode_bound(32, 9, hidden, 61, 50e9).seconds for hidden in (7168, 7000))
    assert exact / rounded == pytest.approx(7168 / 7000)


@pytest.mark.parametrize(("name", "experts"), [("deepseek_v3_671b", 9), ("deepseek_v2", 7), ("glm_4_7_flash", 5)])
def test_shared_experts_are_one_more_transfer(name, experts):
    assert experts_reached(preset(name).model) == experts


def test_a_million_tokens_at_one_a_second_cost_a_million_seconds():
    assert dollars_per_million(1, 3600.0) == pytest.approx(1e6)
    assert dollars_per_million(14.8e3 / 8, 2.0) == pytest.approx(0.3003, abs=1e-4)
