"""Serving in FP8: released block weights multiplied as they are, by rounded activations, against multiplying them out."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8.linear import linear
from dsv3_jax.fp8.precision import SERVING, products
from dsv3_jax.fp8.quantize import Quantised
from dsv3_jax.inference.loaded import load
from dsv3_jax.interop.config_json import model_config
from oracles.cases import DATA

FP8 = DATA / "fp8"


@pytest.fixture(scope="module")
def loaded():
    return {
        "out": load(FP8, dtype="float32"),
        "fp8": load(FP8, dtype="float32", keep_fp8=True, fp8=SERVING),
    }


def tokens():
    return np.random.default_rng(0).integers(0, 100, (2, 24)).astype(np.int32)


def stored_matrices(tree, path=()):
    """(name, matrix [in, out] of one layer, of one expert) of every weight that the file has in FP8."""
    if isinstance(tree, Quantised):
        stack = len(tree.values.shape) - 2
        index = (0,) * stack
        yield path, Quantised(tree.values[index], tree.scale[index], tree.values.shape[-2:], tree.tile, tree.form)
    elif isinstance(tree, dict):
        for name, child in tree.items():
            yield from stored_matrices(child, (*path, name))


def test_every_released_matrix_times_fp8_activations_is_near_its_bfloat16_product(loaded):
    """DeepGEMM's measure, 1 - 2<x, y> / (<x, x> + <y, y>), below 1e-3: here activations alone are rounded."""
    config, rng, found = loaded["fp8"].config, np.random.default_rng(1), 0
    for path, matrix in stored_matrices(loaded["fp8"].params):
        name = "experts." + path[-1] if "experts" in path else path[-1]
        how = products(config, name)
        assert how is not None, path
        x = jnp.asarray(rng.normal(size=(33, matrix.shape[0])), jnp.bfloat16)
        ours = np.asarray(linear(x, matrix, how), np.float64)
        theirs = np.asarray(jnp.matmul(x, matrix.astype(jnp.bfloat16), preferred_element_type=jnp.float32), np.float64)
        difference = 1 - 2 * (ours * theirs).sum() / ((ours**2).sum() + (theirs**2).sum())
        assert 1e-5 < difference < 1e-3, (path, difference)
        found += 1
    assert found >= 8


def test_weights_are_multiplied_as_they_are_stored(loaded):
    """Were they rounded again, blocks whose largest value is not the format's largest would change."""
    path, matrix = next(item for item in stored_matrices(loaded["fp8"].params) if item[0][-1] == "q_b_proj")
    halved = Quantised(matrix.values.astype(jnp.float32) / 2, matrix.scale * 2, matrix.sides, matrix.tile, matrix.form)
    how, x = products(loaded["fp8"].config, path[-1]), jnp.ones((3, matrix.shape[0]))
    np.testing.assert_allclose(linear(x, halved, how), linear(x, matrix, how), rtol=1e-5, atol=1e-5)


def test_scoring_in_fp8_is_near_scoring_with_the_weights_multiplied_out(loaded):
    """Where choices of experts agree, they differ by what rounding activations to 4 bits does; elsewhere by more."""
    out, fp8 = (loaded[name].score(tokens()) for name in ("out", "fp8"))
    a, b = (np.asarray(s.logits, np.float64) for s in (out, fp8))
    same_BT = (np.sort(out.router_indices, axis=-1) == np.sort(fp8.router_indices, axis=-1)).all(axis=(0, -1))
    assert same_BT.mean() > 0.3
    assert 1e-4 < np.linalg.norm((a - b)[same_BT]) / np.linalg.norm(b[same_BT]) < 0.2
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < 0.5


def test_without_being_asked_for_fp8_nothing_is_rounded(loaded):
    kept = load(FP8, dtype="float32", keep_fp8=True)
    assert kept.config.fp8 is None
    np.testing.assert_allclose(kept.score(tokens()).logits, loaded["out"].score(tokens()).logits, rtol=0, atol=1e-4)


def test_released_configurations_say_nothing_of_fp8_training():
    import json

    assert model_config(json.loads((FP8 / "config.json").read_text()), "config.json").fp8 is None
