"""Opens whatever holds a model: a released folder, its tensors in Orbax, or a training run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.check import check_tensors
from dsv3_jax.interop.config_json import model_config
from dsv3_jax.interop.folder import CONFIG, ReleasedFolder, Tensors
from dsv3_jax.interop.orbax_folder import TABLE, OrbaxFolder
from dsv3_jax.interop.run_folder import RunFolder, is_run

# In which the numbers are made, and not what they mean: config.json does not speak of these.
NUMERICS: dict[str, Any] = {"remat": "none", "fp8": None} | {
    f"{name}_implementation": "auto" for name in ("experts", "attention", "decode", "router", "fp8")
}


class Source(NamedTuple):
    """`tensors` by released name, checked against `config`; `config_json` where there is one; `folder` holds them,
    and what else there is of the model."""

    tensors: Tensors
    config: ModelConfig
    config_json: Mapping[str, Any] | None
    folder: Path


def open_source(folder: str | Path, *, compute_dtype: str = "float32", mtp: bool = True, average: bool = False) -> Source:
    """Opens and checks a checkpoint; reads headers and scales, no weight.

    `compute_dtype` is what the configuration says to compute in. Without `mtp` the MTP modules are left out. `average` takes a
    run's averaged weights; RUN/checkpoints/STEP is a run as it was then. Raises ValueError, one line with file and tensor, for
    anything that is not as it should be.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{folder}: expected a checkpoint's folder, got {'a file' if path.exists() else 'nothing'}")
    tensors: Any
    if is_run(path):
        tensors, released = RunFolder(path, average=average), None
        path = tensors.run_folder
        config = dataclasses.replace(tensors.run.model, param_dtype=compute_dtype, compute_dtype=compute_dtype, **NUMERICS)
    else:
        if average:
            raise ValueError(f"{folder}: only a training run has averaged weights")
        tensors = OrbaxFolder(path) if (path / TABLE).exists() else ReleasedFolder(path)
        released = tensors.config_json
        config = model_config(released, str(path / CONFIG), param_dtype=compute_dtype, compute_dtype=compute_dtype, **NUMERICS)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    experts = config.n_routed_experts if config.n_moe_layers else 0
    if max(layers, experts) > len(tensors.entries):  # said before anything is done for each of them
        what = f"{layers:,} layers with {experts:,} experts"
        raise ValueError(f"{path}: {len(tensors.entries):,} tensors are too few for {what}, which config.json promises")
    if not mtp and config.num_nextn_predict_layers:
        tensors = WithoutMtp(tensors, config)
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
        released = None if released is None else {**released, "num_nextn_predict_layers": 0}
    check_tensors(tensors, config)
    return Source(tensors, config, released, path)


class WithoutMtp:
    """The same tensors but for those of the layers after the main model's."""

    def __init__(self, tensors: Tensors, config: ModelConfig):
        layers = [f"model.layers.{config.num_hidden_layers + depth}." for depth in range(config.num_nextn_predict_layers)]
        self.where, self.file_of, self.tensor = tensors.where, tensors.file_of, tensors.tensor
        self.entries = {name: entry for name, entry in tensors.entries.items() if not name.startswith(tuple(layers))}
