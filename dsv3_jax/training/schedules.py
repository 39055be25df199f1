"""Schedules over tokens [§4.2]: learning rate, batch size, bias update speed and MTP weight, as plain Python floats.

`tokens` are the positions that the steps before this one were given (sequences x seq_len, padding included), so that the
host knows every value without asking the device. A point `p` of the published run falls at `p * total / schedule_tokens`
of a run of `total` tokens; at the point itself the later phase has begun. Only the warm-up is counted in steps.
"""

import math

from dsv3_jax.config import Config, TrainConfig


def _point(train: TrainConfig, published_tokens: int | float, total: int | float) -> float:
    return published_tokens * (total / train.schedule_tokens)


def learning_rate(train: TrainConfig, tokens: int | float, total: int | float, step: int) -> float:
    """Rate of optimiser step number `step`.

    Steps are numbered from 1: step n of the warm-up takes n / warmup_steps of the peak, so that "linear from 0" wastes no
    step and step number `warmup_steps` is the first at the peak. Then constant, cosine, constant, final constant.
    """
    warm_up = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    start, end = _point(train, train.lr_decay_start_tokens, total), _point(train, train.lr_decay_end_tokens, total)
    peak, low = train.learning_rate, train.learning_rate_min
    if tokens < start:
        rate = peak
    elif tokens < end:
        rate = low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (tokens - start) / (end - start)))
    elif tokens < _point(train, train.lr_final_start_tokens, total):
        rate = low
    else:
        rate = train.learning_rate_final
    return rate * warm_up


def batch_sequences(train: TrainConfig, tokens: int | float, total: int | float) -> int:
    """Sequences of the step that begins after `tokens`: linear in tokens over the ramp (its shape is not disclosed)."""
    ramp = _point(train, train.batch_ramp_tokens, total)
    done = min(1.0, tokens / ramp) if ramp else 1.0
    return round(train.batch_size_start + (train.batch_size - train.batch_size_start) * done)


def bias_update_speed(train: TrainConfig, tokens: int | float, total: int | float) -> float:
    """Gamma of the router bias's update; 0 from `bias_update_stop_tokens` on."""
    return train.bias_update_speed if tokens < _point(train, train.bias_update_stop_tokens, total) else 0.0


def mtp_loss_weight(train: TrainConfig, tokens: int | float, total: int | float) -> float:
    """Lambda of the multi-token prediction loss."""
    return train.mtp_loss_weight if tokens < _point(train, train.mtp_late_tokens, total) else train.mtp_loss_weight_late


def count_steps(train: TrainConfig, seq_len: int, total: int | float) -> int:
    """Optimiser steps until `total` tokens are seen: the ramp step by step, the rest by division."""
    steps, tokens = 0, 0
    while tokens < total and batch_sequences(train, tokens, total) < train.batch_size:
        tokens += batch_sequences(train, tokens, total) * seq_len
        steps += 1
    return steps + max(0, math.ceil((total - tokens) / (train.batch_size * seq_len)))


def total_tokens(config: Config) -> int:
    """Tokens of the whole run, which the schedules' points scale with.

    With `steps` given: the most tokens that take so many steps. That is steps x batch x seq_len without a ramp; with one,
    the ramp's own length depends on the total, hence the search.
    """
    train, seq_len = config.train, config.data.seq_len
    if train.steps is None:
        assert train.train_tokens is not None, "TrainConfig validates that one of the two lengths is given"
        return math.ceil(train.train_tokens)
    low, high = 1, train.steps * train.batch_size * seq_len  # `high` can take no fewer steps than asked for
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_steps(train, seq_len, middle) <= train.steps else (low, middle - 1)
    return low


def total_steps(config: Config) -> int:
    """Optimiser steps of the whole run."""
    return config.train.steps or count_steps(config.train, config.data.seq_len, total_tokens(config))
