"""A training run's checkpoint, as the training loop stores it but without the training."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.interop.config_json import released_json
from dsv3_jax.training.checkpoint import Checkpoint, Checkpoints, Progress
from dsv3_jax.training.ema import Ema
from oracles.from_checkpoint import from_checkpoint
from oracles.micro import micro_config
from oracles.random_checkpoint import random_tensors


class State(NamedTuple):
    params: Any
    bias: Any


class Run(NamedTuple):
    workdir: Path
    params: Any
    bias: Any


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("run")
    config = micro_config(root)
    tensors = random_tensors(released_json(config.model, dtype="float32"), seed=7)
    params, bias = from_checkpoint(tensors, config.model, np)
    average = Ema(jax.tree.map(lambda p: p * np.float32(0.5), params), 8)
    with Checkpoints(root / "run" / "checkpoints", config) as checkpoints:
        for step, scale in ((2, 0.0), (10, 1.0)):  # not the last by the alphabet
            scaled = jax.tree.map(lambda p, scale=scale: jnp.asarray(p * np.float32(scale)), params)
            checkpoints.save(Checkpoint(State(scaled, jnp.asarray(bias)), average, Progress(step, 0, {})))
    return Run(root / "run", params, bias)
