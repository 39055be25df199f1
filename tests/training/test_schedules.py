"""Schedules against the report's own values [§4.2]."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import Config, DataConfig, TrainConfig
from dsv3_jax.training import schedules

PUBLISHED = TrainConfig()
TOTAL = 14.8e12

# tokens seen, optimiser step: learning rate, sequences, gamma, lambda. 12.15T is half way down the cosine.
POINTS = [
    (0, 0, 0.0, 3072, 1e-3, 0.3),
    (2000 * 3072 * 4096, 2000, 2.2e-4, 3731, 1e-3, 0.3),
    (469e9, 15000, 2.2e-4, 15360, 1e-3, 0.3),
    (10e12, 166_000, 2.2e-4, 15360, 1e-3, 0.1),
    (12.15e12, 200_000, 1.21e-4, 15360, 1e-3, 0.1),
    (14.3e12, 234_000, 2.2e-5, 15360, 0.0, 0.1),
    (14.633e12, 240_000, 7.3e-6, 15360, 0.0, 0.1),
    (14.8e12, 242_000, 7.3e-6, 15360, 0.0, 0.1),
]


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize(("tokens", "step", "rate", "sequences", "speed", "weight"), POINTS)
def test_schedules_have_the_reports_values_at_its_own_points(tokens, step, rate, sequences, speed, weight, scale):
    # Float64 arithmetic on a handful of operations: 1e-12 relative leaves room for a few thousand ulps.
    tokens, total = tokens * scale, TOTAL * scale
    assert schedules.learning_rate(PUBLISHED, tokens, total, step) == pytest.approx(rate, rel=1e-12, abs=0)
    assert schedules.batch_sequences(PUBLISHED, tokens, total) == sequences
    assert schedules.bias_update_speed(PUBLISHED, tokens, total) == speed
    assert schedules.mtp_loss_weight(PUBLISHED, tokens, total) == weight


def test_phases_begin_at_their_points_and_not_before():
    def before(point: float):
        return math.nextafter(point, 0)

    assert schedules.learning_rate(PUBLISHED, before(14.633e12), TOTAL, 240_000) == 2.2e-5
    assert schedules.bias_update_speed(PUBLISHED, before(14.3e12), TOTAL) == 1e-3
    assert schedules.mtp_loss_weight(PUBLISHED, before(10e12), TOTAL) == 0.3
    # The cosine is continuous at both ends.
    assert schedules.learning_rate(PUBLISHED, before(14.3e12), TOTAL, 234_000) == pytest.approx(2.2e-5, rel=1e-9)
    assert schedules.learning_rate(PUBLISHED, 10e12 + 1, TOTAL, 234_000) == pytest.approx(2.2e-4, rel=1e-9)


def test_warm_up_is_linear_from_zero_and_counted_in_steps_whatever_the_runs_length():
    for total in (TOTAL, 1e9):
        rates = [schedules.learning_rate(PUBLISHED, 0, total, step) for step in (0, 1, 1000, 1999, 2000, 2001)]
        assert rates == pytest.approx([0, 1.1e-7, 1.1e-4, 2.2e-4 * 1999 / 2000, 2.2e-4, 2.2e-4], rel=1e-12)
    assert schedules.learning_rate(TrainConfig(warmup_steps=0), 0, TOTAL, 1) == 2.2e-4


def test_the_published_run_has_about_fifteen_thousand_ramp_steps_and_242_thousand_in_all():
    # Facts 7.2, derived: about 15.0K steps of ramp (linear in tokens), about 227.8K after it.
    tokens, steps = 0, 0
    while schedules.batch_sequences(PUBLISHED, tokens, TOTAL) < PUBLISHED.batch_size:
        tokens += schedules.batch_sequences(PUBLISHED, tokens, TOTAL) * 4096
        steps += 1
    assert 14_900 < steps < 15_100
    assert 227_700 < schedules.total_steps(Config()) - steps < 227_900


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 400), batch=st.integers(1, 64), data=st.data())
def test_a_run_given_in_steps_is_exactly_so_long_also_with_a_ramp(steps, batch, data):
    start = data.draw(st.integers(1, batch))
    config = Config(train=TrainConfig(steps=steps, batch_size=batch, batch_size_start=start), data=DataConfig(seq_len=8))
    total = schedules.total_tokens(config)
    assert schedules.total_steps(config) == steps
    # One token more would need one step more.
    assert schedules.count_steps(config.train, 8, total) <= steps < schedules.count_steps(config.train, 8, total + 1)
    if start == batch:
        assert total == steps * batch * 8


def test_a_run_given_in_tokens_counts_every_step_of_a_simulated_run():
    config = Config(train=TrainConfig(train_tokens=1e6, batch_size=32, batch_size_start=2), data=DataConfig(seq_len=16))
    tokens = steps = 0
    while tokens < 1e6:
        tokens += schedules.batch_sequences(config.train, tokens, 1e6) * 16
        steps += 1
    assert schedules.total_steps(config) == steps
