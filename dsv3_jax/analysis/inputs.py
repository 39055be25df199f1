"""What a notebook is given by the environment: named folders; records and checkpoints of the training runs in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.interop.read import load_bias, load_parameters
from dsv3_jax.interop.run_folder import steps_of
from dsv3_jax.interop.source import open_source
from dsv3_jax.model.module import Variables
from dsv3_jax.settings import from_dict
from dsv3_jax.tracing.store import layer_names
from dsv3_jax.training.journal import read_metrics, read_routing


def named_folders(setting: str, text: str, least: int = 1) -> dict[str, Path]:
    """`name=folder,name=folder,...`, in order. Raises ValueError, one line that begins with `setting`, for anything else, for a
    name that comes twice, and for fewer than `least`."""
    found: dict[str, Path] = {}
    for part in text.split(","):
        name, _, folder = (piece.strip() for piece in part.partition("="))
        if not name or not folder:
            raise ValueError(f"{setting}: expected name=folder,name=folder,..., got {text!r}")
        if name in found:
            raise ValueError(f"{setting}: the name {name!r} comes twice; give each folder its own")
        found[name] = Path(folder)
    if len(found) < least:
        raise ValueError(f"{setting}: expected at least {least} folders, got {len(found)}: {text!r}")
    return found


class Run(NamedTuple):
    """Records of a training run, one a step; T of them. Arrays may be memory maps."""

    config: Config
    records: list[dict[str, Any]]  # lines of metrics.jsonl
    step_T: Integer[np.ndarray, " T"]
    load_TLE: Integer[np.ndarray, "T L E"]  # tokens that chose each expert in the step's batch
    bias_TLE: Float[np.ndarray, "T L E"]  # the router's, as the step left it

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the L layers, as a routing trace has them."""
        return layer_names(self.config.model)


def read_run(folder: str | Path) -> Run:
    """Of a folder that `experiments.train` wrote, or `experiments.compare` as ARM/seed-0; the run may still go on.

    Raises ValueError, one line, for a folder without a run, a run without a layer that has a router, and one without a step.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder}: expected the folder of a training run, found no run.json in it")
    try:
        config = from_dict(json.loads((folder / "run.json").read_text())["config"])
        records = read_metrics(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: damaged: {' '.join(str(error).split())[:200]}") from None
    n_layers, n_experts = config.model.n_moe_layers, config.model.n_routed_experts
    if not n_layers:
        raise ValueError(f"{folder}: expected a run with routers, this one's model has only dense layers")
    routing = read_routing(folder, n_layers, n_experts)
    n = min(len(records), len(routing))  # a run that goes on, or was killed, may have written one of the two
    if not n:
        raise ValueError(f"{folder}: expected records of at least one step, found none; let the run take some")
    return Run(config, records[:n], routing["step"][:n], routing["load"][:n], routing["bias"][:n])


def read_runs(setting: str, text: str) -> dict[str, Run]:
    """By name. Raises ValueError as `named_folders` and `read_run`, and for runs whose layers or experts differ."""
    runs = {name: read_run(folder) for name, folder in named_folders(setting, text).items()}
    (first, ours), *others = runs.items()
    for name, run in others:
        for what, a, b in (
            ("layers", ours.layers, run.layers),
            ("number of experts", ours.load_TLE.shape[2], run.load_TLE.shape[2]),
        ):
            if a != b:
                raise ValueError(f"{setting}: expected the same {what} in all runs, got {a} in {first} and {b} in {name}")
    return runs


def checkpoints(folder: str | Path) -> Iterator[tuple[int, Variables, ModelConfig]]:
    """Every complete checkpoint that a run has kept: step, parameters and bias in float32, and the model's configuration to
    compute in float32. One is read at a time. Raises ValueError, one line, for a damaged one; OSError."""
    for path in steps_of(folder):
        source = open_source(path)
        params = load_parameters(source.tensors, source.config, "float32")
        yield int(path.name), Variables(params, load_bias(source.tensors, source.config)), source.config
