"""Checks of the checkpoint reader against `from_checkpoint`, which tests run on the sound code and on faulty copies."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.inference.loaded import load
from oracles.cases import DATA, load_case
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.released_folder import multiplied_out, released_config, released_tensors, write_folder


def check_same_parameters(actual: Any, expected: Any) -> None:
    """Equal bits, leaf by leaf; NaN is never equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), err_msg=str(path))


def check_stored_case(name: str) -> None:
    config, tensors, _ = load_case(name)
    loaded = load(DATA / name)
    params, bias = from_checkpoint(tensors, model_config(config), np)
    check_same_parameters(loaded.params, params)
    np.testing.assert_array_equal(loaded.bias_LE, bias)


def check_fp8_is_multiplied_out() -> None:
    check_stored_case("fp8")


def check_heads_are_told_apart() -> None:
    check_stored_case("wide")


def check_mtp_is_found_by_the_depth() -> None:
    """Two modules behind three layers, one behind one: no number is the same."""
    for layers, depth in ((3, 2), (1, 1)):
        released = released_config(num_hidden_layers=layers, num_nextn_predict_layers=depth)
        with tempfile.TemporaryDirectory() as folder:
            tensors = released_tensors(released, seed=layers)
            write_folder(Path(folder), released, tensors)
            check_same_parameters(load(folder).params, from_checkpoint(multiplied_out(tensors), model_config(released), np)[0])
