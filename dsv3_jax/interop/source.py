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
from dsv3_jax.interop.run_folder import RunFolder

# In which the numbers are made, and not what they mean: config.json does not speak of these.
NUMERICS: dict[str, Any] = {"remat": "none", "experts_implementation": "auto"}


class Source(NamedTuple):
    """`tensors` by released name, checked against `config`; `config_json` where there is one; files beside them in `folder`."""

    tensors: Tensors
    config: ModelConfig
    config_json: Mapping[str, Any] | None
    folder: Path


def open_source(folder: str | Path, *, compute_dtype: str = "float32", mtp: bool = True, average: bool = False) -> Source:
    """Opens and checks a checkpoint; reads headers and scales, no weight.

    `compute_dtype` is what the configuration says to compute in. Without `mtp` the MTP modules are left out. `average` takes a
    run's averaged weights. Raises ValueError, one line with file and tensor, for anything that is not as it should be.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{folder}: expected a checkpoint's folder, got {'a file' if path.exists() else 'nothing'}")
    tensors: Any
    if (path / "checkpoints").is_dir() or path.name == "checkpoints":
        tensors, released = RunFolder(path, average=average), None
        config = dataclasses.replace(tensors.run.model, param_dtype=compute_dtype, compute_dtype=compute_dtype, **NUMERICS)
    else:
        if average:
            raise ValueError(f"{folder}: only a training run has averaged weights")
        tensors = OrbaxFolder(path) if (path / TABLE).exists() else ReleasedFolder(path)
        released = tensors.config_json
        config = model_config(released, str(path / CONFIG), param_dtype=compute_dtype, compute_dtype=compute_dtype, **NUMERICS)
    if not mtp:
        tensors = _without_mtp(tensors, config)
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    check_tensors(tensors, config)
    return Source(tensors, config, released, path)


def _without_mtp(tensors: Any, config: ModelConfig) -> Any:
    """The same tensors but for those of the layers after the main model's."""
    layers = [f"model.layers.{config.num_hidden_layers + depth}." for depth in range(config.num_nextn_predict_layers)]
    tensors.entries = {n: e for n, e in tensors.entries.items() if not layers or not n.startswith(tuple(layers))}
    return tensors
