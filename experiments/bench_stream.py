"""How long does a model larger than memory take to trace, and how much memory?

    python -m experiments.bench_stream [--preset=deepseek_v3_671b] [--layers=N] [--tokens=64] [--folder=DIR]

Writes a released folder of the preset's model, FP8 blocks as they are released, whose matrices are holes in its files: zeros
that take no space on the disk; embeddings, routers and their biases are random, so that every layer routes on its own. Then
`experiments.trace --stream_layers` takes the trace of random tokens. `--layers`: only so many of the main model, the dense
ones first, and no MTP module. One JSON line: seconds in all and of a layer, peak memory, bytes of the folder and of the largest
layer. What a disk takes to read the bytes comes on top. 671B: 0.4 GB of disk, memory for one layer (11.5 GB) and some.
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.check import FP8, grid, wanted_tensors
from dsv3_jax.interop.config_json import released_json
from dsv3_jax.interop.folder import CONFIG, INDEX
from dsv3_jax.interop.names import SCALE, bias_names
from dsv3_jax.interop.recode import fp8_names, quantization_config
from dsv3_jax.interop.safetensors import Planned, header_bytes
from dsv3_jax.presets import preset
from dsv3_jax.training.journal import write_json
from experiments import _bench, _cli

BF16, FP32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
IDS = 4096  # of the vocabulary: those that have an embedding


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("preset", "deepseek_v3_671b", "whose model", flag_values=values)
    flags.DEFINE_integer("layers", None, "of the main model; default: all, and MTP's", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("tokens", 64, "of the text", lower_bound=1, flag_values=values)
    flags.DEFINE_string("folder", None, "where to write the model; it is left there", flag_values=values)


def shard_of(name: str) -> str:
    """A layer a file."""
    parts = name.split(".")
    return f"layer-{int(parts[2]):03d}.safetensors" if parts[1] == "layers" else "tables.safetensors"


def values_of(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
    """The first rows of a tensor; None: all zeros."""
    if name.endswith("embed_tokens.weight"):
        return rng.standard_normal((min(IDS, shape[0]), *shape[1:]), np.float32)
    if name.endswith("mlp.gate.weight"):
        return rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[1]))
    if name.endswith("e_score_correction_bias"):
        return 0.01 * rng.standard_normal(shape, np.float32)
    return np.ones(shape, np.float32) if len(shape) == 1 or name.endswith(SCALE) else None


def write_hollow(folder: Path, config: ModelConfig) -> int:
    """The model's folder; returns its bytes, holes included. Raises OSError."""
    quantised, biases, rng = set(fp8_names(config)), set(bias_names(config)), np.random.default_rng(0)
    shards: dict[str, list[Planned]] = {}
    for name, shape in wanted_tensors(config):
        kind = FP8 if name in quantised else FP32 if name in biases else BF16
        own = shards.setdefault(shard_of(name), [])
        own.append(Planned(name, kind, shape, lambda: ()))
        if kind == FP8:
            own.append(Planned(name + SCALE, FP32, grid(shape), lambda: ()))
    total = 0
    for file, tensors in shards.items():
        header = header_bytes(tensors, {})
        with (folder / file).open("wb") as out:
            out.write(header)
            at = len(header)
            for tensor in tensors:
                values = values_of(tensor.name, tensor.shape, rng)
                if values is not None:
                    out.seek(at)
                    out.write(values.astype(tensor.dtype).tobytes())
                at += tensor.n_bytes
            out.truncate(at)
        total += at
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / CONFIG, released_json(config, dtype="bfloat16", quantization=quantization_config(False)))
    return total


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    config = dataclasses.replace(preset(values.preset).model, param_dtype="bfloat16", compute_dtype="bfloat16")
    if values.layers is not None:
        if values.layers > config.num_hidden_layers:
            raise ValueError(f"--layers: expected at most the model's {config.num_hidden_layers}, got {values.layers}")
        config = dataclasses.replace(config, num_hidden_layers=values.layers, num_nextn_predict_layers=0)
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-")))
        folder = Path(values.folder) if values.folder else temporary / "model"
        _cli.make_folder(folder)
        size = write_hollow(folder, config)
        tokens = np.random.default_rng(1).integers(0, min(IDS, config.vocab_size), (1, values.tokens)).astype(np.int32)
        np.save(temporary / "tokens.npy", tokens)
        seconds, peak = traced(folder, temporary)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    _bench.show({
        "what": "stream", "preset": values.preset, "layers": layers, "tokens": values.tokens, "folder_gb": round(size / 1e9, 3),
        "largest_layer_gb": round(largest_layer(config) / 1e9, 3), "seconds": round(seconds, 1),
        "seconds_per_layer": round(seconds / layers, 2), "peak_gb": round(peak / 1e9, 3),
    })  # fmt: skip
    return 0


def largest_layer(config: ModelConfig) -> int:
    """Bytes of its tensors, scales left out."""
    quantised, sizes = set(fp8_names(config)), dict[str, int]()
    for name, shape in wanted_tensors(config):
        sizes[shard_of(name)] = sizes.get(shard_of(name), 0) + math.prod(shape) * (1 if name in quantised else 2)
    return max(n for shard, n in sizes.items() if shard.startswith("layer"))


def traced(folder: Path, temporary: Path) -> tuple[float, int]:
    """Seconds and peak memory of the program. Raises ValueError if it fails."""
    command = [sys.executable, "-m", "experiments.trace", f"--checkpoint={folder}", f"--data={temporary / 'tokens.npy'}"]
    command += [f"--out={temporary / 'trace'}", "--stream_layers", "--dtype=bfloat16"]
    start = time.perf_counter()
    ended: Any = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    seconds = time.perf_counter() - start
    if ended.returncode:
        raise ValueError(f"experiments.trace failed with {ended.returncode}; its own words are above")
    unit = 1 if sys.platform == "darwin" else 1024
    about = json.loads((temporary / "trace" / "trace.json").read_text())
    assert about["n_tokens"] > 0, about
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
