"""The training step with kernels in place of plain operations: the same gradients, counts and loss."""

import jax
import numpy as np
import pytest

from dsv3_jax.settings import override
from oracles.accelerators import HERE
from oracles.checks_step import RELEASED, rows, run_gradients, step_config
from oracles.random_checkpoint import random_tensors


@pytest.mark.parametrize(
    "kernels", ["pallas_tpu:interpret", pytest.param("pallas_gpu:interpret", marks=pytest.mark.slow), *HERE]
)
@jax.default_matmul_precision("highest")  # for accelerators
def test_the_step_with_kernels_is_the_step_without(kernels):
    config, tensors = step_config(RELEASED, model={"remat": "report"}), random_tensors(RELEASED, seed=0)
    plain, terms = run_gradients(config, tensors, rows(), 2)
    all_of_them = {f"{name}_implementation": kernels for name in ("experts", "attention", "router")}
    with_kernels, kernel_terms = run_gradients(override(config, all_of_them), tensors, rows(), 2)
    # float32 sums in another order, once forward and once backward: some 2^-24 * sqrt(terms) of each tensor's norm.
    for (path, a), b in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(with_kernels), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), jax.tree_util.keystr(path)
    for (path, a), b in zip(jax.tree.leaves_with_path(terms), jax.tree.leaves(kernel_terms), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "attention"), [("pallas_tpu:interpret", True), ("pallas_gpu:interpret", False)])
def test_the_step_in_fp8_with_kernels_is_the_step_in_fp8_without(kernels, attention):
    """Operands are rounded alike, so that what differs is sums in float32: some 2^-22.

    With attention's kernel XLA compiles another program of all else, in which values that are rounded a second time, along the
    tokens, are divided by their scale in another way: ties, of which there are many, go to the other neighbour, 2^-4 off.
    """
    config, tensors = step_config(RELEASED, model={"remat": "report"}), random_tensors(RELEASED, seed=0)
    config = override(config, {"experts_implementation": "bucketed", "fp8": "report"})
    plain, terms = run_gradients(config, tensors, rows(), 2)
    combinations = [(("experts", "router", "fp8"), 1e-5), (("experts", "router", "fp8", "attention"), 2e-2)]
    for names, tolerance in combinations[: 1 + attention]:
        chosen = {f"{name}_implementation": kernels for name in names}
        with_kernels, kernel_terms = run_gradients(override(config, chosen), tensors, rows(), 2)
        for (path, a), b in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(with_kernels), strict=True):
            name = jax.tree_util.keystr(path)
            assert np.linalg.norm(a - b) <= (tolerance if "_proj" in name else 1e-5) * np.linalg.norm(a), name
        for (path, a), b in zip(jax.tree.leaves_with_path(terms), jax.tree.leaves(kernel_terms), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
