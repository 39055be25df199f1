"""Checks of counts, bias controller and balance losses; run by their tests, and by the mutants, which must fail them."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.moe import balance
from dsv3_jax.moe.router import Routing
from oracles import numpy_moe, vectors
from oracles.numpy_layers import sigmoid

LOSSES = ("sequence", "batch", "classical")


def balance_config(experts: int, k: int, **changes: object) -> ModelConfig:
    return ModelConfig(n_routed_experts=experts, num_experts_per_tok=k, n_group=1, topk_group=1, **changes)


def routing_of(logits: np.ndarray, indices: np.ndarray) -> Routing:
    """A record as the router would write it, for chosen `indices`."""
    logits32 = jnp.asarray(logits, jnp.float32)
    scores = jax.nn.sigmoid(logits32)
    return Routing(jnp.asarray(indices, jnp.int32), jnp.ones(indices.shape, jnp.float32), scores, logits32, scores[..., 0])


def scope_of(valid: np.ndarray, load: np.ndarray | None = None) -> balance.Scope:
    """The whole step is this one batch."""
    sequences, tokens = valid.any(axis=1).sum(), valid.sum()
    load_E = None if load is None else jnp.asarray(load, jnp.int32)
    return balance.Scope(jnp.asarray(valid), jnp.float32(sequences), jnp.float32(tokens), load_E)


def check_known_balance() -> None:
    """Four tokens, four experts, top-2: counts, loss, bias step and MaxVio worked out by hand."""
    config = balance_config(4, 2)
    logits = vectors.BALANCE_LOGITS[None, :, :]
    indices = jax.lax.top_k(jnp.asarray(logits, jnp.float32), 2)[1]
    valid = np.ones((1, 4), bool)
    load = balance.count_load(indices, jnp.asarray(valid), 4)
    assert load.tolist() == vectors.BALANCE_COUNTS and load.dtype == jnp.int32
    sign = balance.CONTROLLERS["sign"]()
    assert sign.loss is not None and sign.move_bias is not None
    loss = float(sign.loss(routing_of(logits, np.asarray(indices)), scope_of(valid), config))
    assert abs(loss - vectors.BALANCE_LOSS) < 3e-7
    assert abs(sign.alpha * loss - vectors.BALANCE_LOSS_TIMES_ALPHA) < 1e-10
    moved = sign.move_bias(jnp.zeros(4), load, jnp.float32(vectors.BIAS_RATE))
    np.testing.assert_array_equal(moved, np.array(vectors.BIAS_AFTER_ONE_STEP, np.float32))
    assert float(balance.max_violation(load)) == vectors.MAX_VIOLATION


def check_counts_leave_padding_out() -> None:
    rng = np.random.default_rng(1)
    indices = np.argsort(rng.random((3, 7, 6)), axis=-1)[:, :, :2].astype(np.int32)
    valid = rng.random((3, 7)) < 0.6
    valid[2] = False
    load = balance.count_load(jnp.asarray(indices), jnp.asarray(valid), 6)
    np.testing.assert_array_equal(load, numpy_moe.expert_counts(indices, 6, valid))
    assert int(load.sum()) == 2 * int(valid.sum())


def check_losses_equal_the_reference(seed: int = 0) -> None:
    """Ragged sequences, one of them all padding, on a skewed router: the three losses differ there, and from each other."""
    rng = np.random.default_rng(seed)
    experts, k = 6, 2
    logits = (rng.standard_normal((4, 7, experts)) * 2 + np.linspace(-2, 2, experts)).astype(np.float32)
    logits[1] = logits[1, :, ::-1]  # one sequence leans the other way, so sequence-wise and batch-wise differ
    indices = np.argsort(-logits, axis=-1, kind="stable")[:, :, :k]
    valid = np.arange(7)[None, :] < np.array([7, 5, 0, 3])[:, None]
    scores, config = sigmoid(logits.astype(np.float64)), balance_config(experts, k)
    expected = {
        "sequence": numpy_moe.sequence_wise_loss(scores, indices, valid),
        "batch": numpy_moe.batch_wise_loss(scores, indices, valid),
        "classical": numpy_moe.classical_loss(logits.astype(np.float64), indices, valid),
    }
    values = sorted(expected.values())
    assert min(b - a for a, b in zip(values, values[1:], strict=False)) > 1e-2
    load = numpy_moe.expert_counts(indices, experts, valid)
    for name in LOSSES:
        loss = balance.CONTROLLERS[name]().loss
        assert loss is not None
        actual = float(loss(routing_of(logits, indices), scope_of(valid, load), config))
        assert abs(actual - expected[name]) < 2e-6, (name, actual, expected[name])  # values near 1 to 2


def check_sign_is_exact_at_large_counts() -> None:
    """Loads beyond float32's 2^24 and with a sum just below 2^31, one token apart."""
    for load in ([536870911, 536870912, 536870911, 536870913], [33554433, 33554432, 33554433, 33554432], [5, 5, 5, 6], [3] * 4):
        loads = np.array(load, np.int64)
        moved = balance.CONTROLLERS["sign"]().move_bias(jnp.zeros(4), jnp.asarray(loads, jnp.int32), jnp.float32(1e-3))
        np.testing.assert_array_equal(moved, numpy_moe.sign_bias_update(np.zeros(4), loads, 1e-3).astype(np.float32))


def check_bias_keeps_small_steps() -> None:
    """Beside a bias of order 1 a step of 1e-3 is below BF16's spacing; 100 steps must add up, and biases stay distinct."""
    start = np.linspace(-1.0, 1.0, 257)
    load = np.where(np.arange(257) % 2 == 0, 2, 4)
    bias = jnp.asarray(start, jnp.float32)
    move = balance.CONTROLLERS["sign"]().move_bias
    assert move is not None
    for _ in range(100):
        bias = move(bias, jnp.asarray(load, jnp.int32), jnp.float32(1e-3))
    expected = start + 0.1 * np.sign(load.mean() - load)
    np.testing.assert_allclose(bias, expected, rtol=0, atol=1e-5)  # a hundred roundings of 6e-8
    assert bias.dtype == jnp.float32 and len(np.unique(bias)) == 257
