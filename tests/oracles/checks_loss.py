"""The chunked cross entropy against a float64 one, value and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.training import loss
from oracles.compiling import quick_jit


def reference(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray, ...]:
    """Weighted sum, nll [B, T], and the sum's gradients in hidden and head, float64."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    one_hot = targets[..., None] == np.arange(head.shape[0])
    nll = -(log_p * one_hot).sum(axis=-1)
    d_logits = (np.exp(log_p) - one_hot) * weights[..., None]
    return float((weights * nll).sum()), nll, d_logits @ head, np.einsum("btv,btd->vd", d_logits, hidden)


def check_cross_entropy(
    *, batch: int = 2, length: int = 7, hidden: int = 5, vocab: int = 11, chunk: int = 3, scale: float = 1.0,
    dtype: str = "float32", weighted: bool = True, seed: int = 0,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    x = jnp.asarray(scale * rng.standard_normal((batch, length, hidden)), dtype)
    head = jnp.asarray(rng.standard_normal((vocab, hidden)), dtype)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    weights = ((rng.random((batch, length)) < 0.7) if weighted else np.zeros((batch, length))).astype(np.float32)

    def total(x, head):
        return loss.cross_entropy(x, head, jnp.asarray(targets), jnp.asarray(weights), chunk)

    plain_total, plain_nll = quick_jit(total)(x, head)
    (value, nll), (d_x, d_head) = quick_jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, head)
    expected, expected_nll, expected_dx, expected_dhead = reference(np.asarray(x), np.asarray(head), targets, weights)
    # BF16's rounding of the probabilities' gradient and of the result, 2^-8 each; float32 elsewhere, relative to the logits.
    fine, coarse = 1e-6 * max(1.0, scale), (2e-6 if dtype == "float32" else 1.5e-2) * max(1.0, scale**0.5)
    np.testing.assert_array_equal(plain_total, value)
    np.testing.assert_array_equal(plain_nll, nll)
    assert value.dtype == nll.dtype == jnp.float32 and d_x.dtype == d_head.dtype == x.dtype
    np.testing.assert_allclose(nll, expected_nll, rtol=2e-6, atol=8 * fine)
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=50 * fine)
    for actual, wanted in ((d_x, expected_dx), (d_head, expected_dhead)):
        size = max(np.abs(wanted).max(), 1e-30)
        np.testing.assert_allclose(np.asarray(actual, np.float64) / size, wanted / size, rtol=0, atol=coarse)
