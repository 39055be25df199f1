"""Whether a folder holds the checkpoint that its config.json describes: every tensor, of the right shape and kind, no other.

Nothing is allocated, and of the tensors only scales and doubled tables are looked at.
"""

from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.quantize import FP8_BLOCK
from dsv3_jax.interop.folder import Tensors
from dsv3_jax.interop.names import IGNORED, SCALE, bias_names, copies, leaves
from dsv3_jax.interop.safetensors import quoted

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
PLAIN = tuple(np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64))
SCALES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), E8M0)


def grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a matrix: one for each block, edge blocks included."""
    return tuple(-(-size // FP8_BLOCK) for size in shape)


def wanted_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight and bias that a model of `config` is made of, without scales and copies."""
    for leaf in jax.tree.leaves(leaves(config)):
        shape = leaf.released_shape
        yield from ((name, shape) for _, name in leaf.names())
    for name in bias_names(config):
        yield name, (config.n_routed_experts,)


def check_tensors(source: Tensors, config: ModelConfig) -> None:
    """Raises ValueError, one line with the file and the tensor, for the first thing that is not as it should be."""
    entries, known = source.entries, set()
    for name, shape in wanted_tensors(config):
        known.add(name)
        if name not in entries:
            raise ValueError(f"{source.where}: tensor {name!r} is missing{_advice(name, config)}")
        _check_tensor(source, name, shape)
        if entries[name][0] == FP8:
            known.add(name + SCALE)
            _check_scale(source, name, shape)
    for name, original in copies(config).items():
        if name in entries:
            known.add(name)
            _check_copy(source, name, original)
    surplus = [name for name in entries if name not in known and not name.endswith(IGNORED)]
    if surplus:
        more = f", and {len(surplus) - 1:,} more" if len(surplus) > 1 else ""
        raise ValueError(
            f"{source.file_of(surplus[0])}: tensor {quoted(surplus[0])} is no part of this model by its config.json{more}"
        )


def _advice(name: str, config: ModelConfig) -> str:
    parts = name.split(".")
    if config.num_nextn_predict_layers and parts[1] == "layers" and int(parts[2]) >= config.num_hidden_layers:
        return ": the MTP module that config.json announces is not there; mtp=False (--nomtp) reads the rest"
    return ""


def _check_tensor(source: Tensors, name: str, shape: tuple[int, ...]) -> None:
    dtype, found = source.entries[name]
    if found != shape:
        raise ValueError(f"{source.file_of(name)}: tensor {name!r}: expected shape {list(shape)}, got {list(found)}")
    allowed = PLAIN if len(shape) == 1 or name.endswith(("embed_tokens.weight", "lm_head.weight")) else (*PLAIN, FP8)
    if dtype not in allowed:
        raise ValueError(
            f"{source.file_of(name)}: tensor {name!r}: expected one of {', '.join(map(str, allowed))}, got {dtype}"
        )


def _check_scale(source: Tensors, name: str, shape: tuple[int, ...]) -> None:
    scale_name = name + SCALE
    if scale_name not in source.entries:
        raise ValueError(f"{source.file_of(name)}: tensor {name!r} is FP8, but its {scale_name.rpartition('.')[2]} is missing")
    where = f"{source.file_of(scale_name)}: tensor {scale_name!r}"
    dtype, found = source.entries[scale_name]
    if dtype not in SCALES or found != grid(shape):
        raise ValueError(f"{where}: expected float32 {list(grid(shape))}, got {dtype} {list(found)}")
    values = source.tensor(scale_name).astype(np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(
            f"{where}: expected positive finite scales, got {values[~(np.isfinite(values) & (values > 0))].flat[0]}"
        )


def _check_copy(source: Tensors, name: str, original: str) -> None:
    """MTP modules share the main model's tables here, so a copy that differs would be lost."""
    (dtype, shape), like = source.entries[name], source.entries[original]
    same = (dtype, shape) == like
    step = max(1, 2**24 // max(1, int(np.prod(shape[1:]))))
    a, b = (source.tensor(n) for n in (name, original))
    for start in range(0, shape[0] if same else 0, step):
        rows = slice(start, start + step)
        same = same and a[rows].tobytes() == b[rows].tobytes()
    if not same:
        raise ValueError(
            f"{source.file_of(name)}: tensor {name!r} is not equal to {original!r}, which this model shares with it; "
            "mtp=False (--nomtp) leaves the MTP modules out"
        )
