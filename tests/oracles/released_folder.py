"""Released-format folders for tests, written without the package: any small config, any dtype, FP8 with scales, shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from oracles.random_checkpoint import SMALL_CONFIG, random_tensors
from oracles.safetensors_reader import DTYPES

BLOCK = 128
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
KIND = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
NEVER_FP8 = ("embed_tokens.weight", "head.weight", "gate.weight", "eh_proj.weight", "e_score_correction_bias")


def header_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": KIND[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    return header


def file_bytes(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    header = ({"__metadata__": dict(metadata)} if metadata else {}) | header_of(tensors)
    path.write_bytes(file_bytes(header, b"".join(tensor.tobytes() for tensor in tensors.values())))


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """config.json and the tensors, in one file or dealt out to `shards` of them with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors"
        own = {name: tensor for j, (name, tensor) in enumerate(tensors.items()) if j % shards == i}
        write_safetensors(folder / file, own, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def released_config(**changes: Any) -> dict[str, Any]:
    return SMALL_CONFIG | {"model_type": "deepseek_v3", "max_position_embeddings": 4096} | changes


def released_tensors(config: Mapping[str, Any], seed: int, dtype: Any = np.float32, fp8: Any = None) -> dict[str, np.ndarray]:
    """Random tensors as a file stores them, copies for MTP too; with `fp8`, a dtype of scales, matrices as FP8."""
    rng, stored = np.random.default_rng(seed), {}
    tensors = random_tensors(dict(config), seed)
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    for name, values in tensors.items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = values.astype(np.float32)
        elif fp8 is not None and values.ndim == 2 and not name.endswith(NEVER_FP8):
            grid = tuple(-(-size // BLOCK) for size in values.shape)
            scale = np.exp2(rng.integers(-3, 3, grid)) * (1 if fp8 == ml_dtypes.float8_e8m0fnu else rng.uniform(1, 2, grid))
            stored[name] = values.astype(FP8)
            stored[name + "_scale_inv"] = scale.astype(fp8)
        else:
            stored[name] = values.astype(dtype)
    for depth in range(config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{config['num_hidden_layers'] + depth}."
        stored[prefix + "embed_tokens.weight"] = stored["model.embed_tokens.weight"]
        if not config["tie_word_embeddings"]:
            stored[prefix + "shared_head.head.weight"] = stored["lm_head.weight"]
    return stored


def multiplied_out(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """FP8 with scales as the float32 weights that they stand for, element by element; everything else as it is."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(name + "_scale_inv")
        if scale is not None:
            rows, columns = (np.arange(size) // BLOCK for size in tensor.shape)
            tensor = tensor.astype(np.float32) * scale.astype(np.float32)[rows[:, None], columns[None, :]]
        result[name] = tensor
    return result
