"""Small pieces that every part of the NumPy reference uses; float64 in, float64 out.

A weight is stored as in a released checkpoint, (out, in), so `linear(x, weight)` is `x @ weight.T`.
Letters in names: B batch, T sequence, D hidden size, E experts, K experts per token, V vocabulary, H heads.
"""

from collections.abc import Callable

import numpy as np


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x @ weight.T


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))  # does not overflow, unlike 1 / (1 + exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; entries of -inf get weight 0."""
    exponential = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return gain * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def swiglu(x: np.ndarray, tensors: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """down(silu(gate(x)) * up(x)) with the tensors `{prefix}gate_proj.weight`, ..."""
    gate = linear(x, tensors[f"{prefix}gate_proj.weight"])
    up = linear(x, tensors[f"{prefix}up_proj.weight"])
    return linear(gate * sigmoid(gate) * up, tensors[f"{prefix}down_proj.weight"])


def numerical_gradient(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function at x, one entry at a time: the reference for gradients."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        here = x[index]
        x[index] = here + step
        above = function(x)
        x[index] = here - step
        below = function(x)
        x[index] = here
        gradient[index] = (above - below) / (2.0 * step)
    return gradient
