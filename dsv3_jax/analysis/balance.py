"""How a controller keeps experts' load even over a training run [§2.1.2, §4.5.2]: MaxVio of windows of steps, how the router's
bias turns, and what its speed does, on a router that stands still.

Runs come as `analysis.inputs.Run` has them, a row a step; arrays may be memory maps. What nothing was counted for is NaN.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from dsv3_jax.analysis import metrics
from dsv3_jax.analysis.metrics import relative_load
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.module import Variables
from dsv3_jax.moe.balance import count_load, max_violation, sign_step
from dsv3_jax.moe.router import SELECTORS
from dsv3_jax.plugins import resolve
from dsv3_jax.tracing.capture import Whole


def windowed_violation(load_TLE: Integer[np.ndarray, "T L E"], window: int) -> Float[np.ndarray, "T L"]:
    """MaxVio of the load of the last `window` steps together; NaN before there are as many. With window 1, of each batch."""
    out, total = np.full(load_TLE.shape[:2], np.nan), np.zeros(load_TLE.shape[1:], np.int64)
    for step in range(len(load_TLE)):
        total += load_TLE[step]
        if step >= window:
            total -= load_TLE[step - window]
        if step >= window - 1:
            out[step] = np.where(total.any(axis=-1), metrics.max_violation(total), np.nan)
    return out


class LoadMap(NamedTuple):
    """Relative load of successive spans of steps, as even as they can be."""

    first: Integer[np.ndarray, "spans_and_one"]  # rows of the run at which the spans begin, and its end
    load: Float[np.ndarray, "E spans"]  # 1: the mean of the layer's experts


def load_map(load_TE: Integer[np.ndarray, "T E"], most: int = 200) -> LoadMap:
    """One layer's, in at most so many spans."""
    first = np.linspace(0, len(load_TE), min(most, len(load_TE)) + 1).astype(np.int64)
    spans = [load_TE[a:b].sum(axis=0, dtype=np.int64) for a, b in zip(first[:-1], first[1:], strict=True)]
    return LoadMap(first, relative_load(np.array(spans)).T)


def turned(bias_TLE: Float[np.ndarray, "T L E"]) -> Float[np.ndarray, "T L"]:
    """Share of experts whose bias has just changed its direction: the step's update has another sign than the last one that
    was not 0. Near balance it is about one half, while biases are on their way about 0."""
    out, last = np.zeros(bias_TLE.shape[:2]), np.zeros(bias_TLE.shape[1:])
    for step in range(1, len(bias_TLE)):
        sign = np.sign(bias_TLE[step].astype(np.float64) - bias_TLE[step - 1])
        out[step] = (sign * last < 0).mean(axis=-1)
        last = np.where(sign != 0, sign, last)
    return out


# --- the speed of the bias ---


class Spread(NamedTuple):
    """Standard deviations of affinities, in units of the score, by layer."""

    token_L: Float[np.ndarray, " L"]  # of one token's E scores, mean over tokens: what decides for this token
    expert_L: Float[np.ndarray, " L"]  # of the E experts' mean scores: what a bias has to make up for


def score_spread(scores_NLE: Float[np.ndarray, "N L E"]) -> Spread:
    scores = scores_NLE.astype(np.float64)
    return Spread(scores.std(axis=-1).mean(axis=0), scores.mean(axis=0).std(axis=-1))


class Balanced(NamedTuple):
    """A point after every `every` steps, S of them."""

    step_S: Integer[np.ndarray, " S"]
    violation_S: Float[np.ndarray, " S"]  # MaxVio of all N tokens with the bias of that step
    bias_SE: Float[np.ndarray, "S E"]


def balance_scores(
    scores_NE: Float[np.ndarray, "N E"], config: ModelConfig, speed: float, *, steps: int, batch_tokens: int, every: int = 10
) -> Balanced:
    """The bias controller of §2.1.2, from a bias of 0, on scores that do not change, so that what a speed does is nobody else's
    doing. Each step's batch is drawn from the N tokens."""
    scores = jnp.asarray(scores_NE, jnp.float32)
    sizes = {"points": steps // every, "every": every, "batch_tokens": batch_tokens}
    violation, bias = _balance(scores, jnp.float32(speed), config=config, **sizes)
    return Balanced(every * np.arange(1, steps // every + 1), np.asarray(violation), np.asarray(bias))


@partial(jax.jit, static_argnames=("config", "points", "every", "batch_tokens"))
def _balance(
    scores_NE: Float[Array, "N E"], speed: Float[Array, ""], *, config: ModelConfig, points: int, every: int, batch_tokens: int
) -> tuple[Float[Array, " S"], Float[Array, "S E"]]:
    select = resolve("topk_method", config.topk_method, SELECTORS)

    def load(own_NE: Array, bias_E: Array) -> Array:
        chosen = jax.lax.top_k(select(own_NE + bias_E[None], config), config.num_experts_per_tok)[1]
        return count_load(chosen[None], jnp.ones((1, len(own_NE)), bool), own_NE.shape[1])

    def step(bias_E: Array, key: Array) -> tuple[Array, None]:
        drawn = jax.random.randint(key, (batch_tokens,), 0, len(scores_NE))
        return sign_step(bias_E, load(scores_NE[drawn], bias_E), speed), None

    def point(bias_E: Array, keys: Array) -> tuple[Array, tuple[Array, Array]]:
        bias_E, _ = jax.lax.scan(step, bias_E, keys)
        return bias_E, (max_violation(load(scores_NE, bias_E)), bias_E)

    keys = jax.random.split(jax.random.key(0), (points, every))
    return jax.lax.scan(point, jnp.zeros(scores_NE.shape[1], jnp.float32), keys)[1]


# --- checkpoints ---


class Choices(NamedTuple):
    """Of N tokens by one checkpoint."""

    experts_NLK: Integer[np.ndarray, "N L K"]
    scores_NLE: Float[np.ndarray, "N L E"]


def choices_of(variables: Variables, config: ModelConfig, tokens_BT: Integer[np.ndarray, "B T"]) -> Choices:
    """Of every token but each sequence's last ones, at which MTP modules have nothing to look ahead at."""
    found = Whole(variables.params, variables.bias_LE, config, scores=True).run(tokens_BT.astype(np.int32)).layers
    kept = tokens_BT.shape[1] - config.num_nextn_predict_layers

    def by_token(x_LBT: Array) -> np.ndarray:
        rows = np.asarray(x_LBT)[:, :, :kept]
        return np.moveaxis(rows.reshape(len(rows), -1, rows.shape[-1]), 0, 1)

    return Choices(by_token(found.experts), by_token(found.scores))


def late_share(values_T: Float[np.ndarray, " T"], share: float = 0.25) -> float:
    """Mean of what is finite in the last part of a run."""
    late = values_T[len(values_T) - max(1, int(share * len(values_T))) :]
    finite = late[np.isfinite(late)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else math.nan
