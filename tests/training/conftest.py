"""One small run that is never interrupted, for the tests that compare with it."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dsv3_jax.config import Config
from dsv3_jax.training import loop, placed
from oracles.micro import micro_config


class Reference(NamedTuple):
    root: Path  # corpus and cache
    config: Config
    workdir: Path
    result: loop.Result


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    """Every test of the folder: runs are of a few steps."""


@pytest.fixture(scope="session", autouse=True)
def initial_states_computed_once():
    """A dozen runs of these tests begin with the same parameters; compiling their initialiser takes longer than a run."""
    plain, known = placed.init_state, {}

    def init_state(config):
        key = (config.model, config.train.seed, config.train.moment_dtype)
        if key not in known:
            with jax.ensure_compile_time_eval():
                known[key] = jax.tree.map(np.asarray, plain(config))
        return jax.tree.map(jnp.array, known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placed, "init_state", init_state)
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    root = tmp_path_factory.mktemp("reference")
    config = micro_config(root)
    with kept_programs(root / "compiled"):
        return Reference(root, config, root / "run", loop.train(config, root / "run", header=False, progress=False))


@contextlib.contextmanager
def kept_programs(folder: Path):
    """What is compiled inside lies in `folder` for other processes."""
    settings = {
        "jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,  # as in every test of the folder
    }  # fmt: skip
    before = {name: jax.config.values[name] for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield
