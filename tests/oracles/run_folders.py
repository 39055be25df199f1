"""Folders of training runs, written without the training: records of random loads, checkpoints of scaled fresh weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.module import init_variables
from dsv3_jax.settings import to_dict
from dsv3_jax.training.checkpoint import Checkpoint, Checkpoints, Progress
from dsv3_jax.training.journal import Journal
from oracles.texts import invented


class State(NamedTuple):
    params: Any
    bias: Any


def write_run(folder: Path, config: Config, steps: int) -> Path:
    """Loss 1 / step, load of `default_rng(step)`, bias step / 2 for every second expert."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": to_dict(config)}))
    tokenizer = train_tokenizer([invented("prose", seed) for seed in range(4)], config.model.vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str())
    shape = config.model.n_moe_layers, config.model.n_routed_experts
    with Journal(folder, *shape, 0) as journal:
        for step in range(1, steps + 1):
            load = np.random.default_rng(step).integers(0, 9, shape).astype(np.int32)
            bias = np.where(np.arange(shape[1]) % 2, 0.5 * step, 0.0).astype(np.float32)
            journal.write({"step": step, "main_loss": 1.0 / step}, load, np.broadcast_to(bias, shape))
    return folder


def write_checkpoints(folder: Path, config: Config, *steps: int) -> None:
    """Parameters are `step` times fresh ones, the bias is `step` everywhere."""
    first = init_variables(config.model)
    with Checkpoints(folder / "checkpoints", config) as kept:
        for step in steps:
            params = jax.tree.map(lambda p, step=step: step * p, first.params)
            state = State(params, jnp.full_like(first.bias_LE, step))
            kept.save(Checkpoint(state, None, Progress(step, 0, {})))
