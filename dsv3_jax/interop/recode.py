"""A checkpoint's tensors in another dtype, some rows at a time [§3.3.2; released format]: FP8 multiplied out, or made.

A released FP8 weight is value * weight_scale_inv, one scale a block of 128 x 128; embedding, head, norms, the router and eh_proj
are never FP8, and the router's bias is always float32.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.check import E8M0, FP8, grid
from dsv3_jax.interop.folder import Tensors
from dsv3_jax.interop.names import SCALE, bias_names, leaves
from dsv3_jax.interop.read import CHUNK, as_float
from dsv3_jax.interop.safetensors import Planned
from dsv3_jax.weights import FP8_BLOCK

Target = Literal["keep", "float32", "bfloat16", "fp8"]
FP8_MAX, SMALLEST_AMAX = 448.0, 1e-4
NEVER_FP8 = ("embed_tokens", "lm_head", "gate", "eh_proj")


def planned(source: Tensors, config: ModelConfig, target: Target, *, power_of_two: bool = False) -> list[Planned]:
    """Every tensor that the new checkpoint holds, in the source's order, a new scale after its weight.

    Raises ValueError for an unknown `target`.
    """
    if target not in get_args(Target):
        raise ValueError(f"--dtype: expected one of {', '.join(get_args(Target))}, got {target!r}")
    if target == "keep":
        return [_kept(source, name) for name in source.entries]
    quantised, biases = set(fp8_names(config)), set(bias_names(config))
    result: list[Planned] = []
    for name, (dtype, shape) in source.entries.items():
        is_scale = name.endswith(SCALE)
        if target == "fp8" and name in quantised and dtype != FP8:
            result += _quantised(source, name, shape, power_of_two)
        elif target == "fp8" and (dtype == FP8 or is_scale):
            result.append(_kept(source, name))
        elif not is_scale:
            kind = np.dtype(np.float32 if target == "float32" or name in biases else ml_dtypes.bfloat16)
            result.append(Planned(name, kind, shape, partial(_cast, source, name, kind)))
    return result


def fp8_names(config: ModelConfig) -> Iterator[str]:
    """The weights that a released FP8 checkpoint holds as FP8."""
    for leaf in jax.tree.leaves(leaves(config)):
        if leaf.n_in and leaf.path.rpartition(".")[2] not in NEVER_FP8:
            yield from (name for _, name in leaf.names())


def quantization_config(power_of_two: bool) -> Mapping[str, Any]:
    """What config.json says of FP8 weights."""
    block = {"weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    scale = {"scale_fmt": "ue8m0"} if power_of_two else {}
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", **block, **scale}


def _kept(source: Tensors, name: str) -> Planned:
    dtype, shape = source.entries[name]

    def pieces() -> Iterator[np.ndarray]:
        tensor = source.tensor(name)
        yield from (tensor[rows] for rows in _rows(tensor.shape)) if tensor.ndim else iter([tensor])

    return Planned(name, dtype, shape, pieces)


def _rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """Runs of rows: whole blocks of FP8, about CHUNK elements."""
    per_row = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    step = max(1, CHUNK // per_row // FP8_BLOCK) * FP8_BLOCK
    yield from (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _cast(source: Tensors, name: str, kind: np.dtype) -> Iterator[np.ndarray]:
    tensor = source.tensor(name)
    scale = source.tensor(name + SCALE).astype(np.float32) if tensor.dtype == FP8 else None
    for rows in _rows(tensor.shape):
        values = as_float(tensor[rows], np.dtype(np.float32))
        if scale is not None:
            values = values * per_element(scale[rows.start // FP8_BLOCK :], values.shape)
        yield as_float(values, kind)


def per_element(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales of blocks [r, c] as those of the elements of `shape`, whose first element begins a block."""
    blocks = scale[: -(-shape[0] // FP8_BLOCK)]
    return np.repeat(np.repeat(blocks, FP8_BLOCK, axis=0)[: shape[0]], FP8_BLOCK, axis=1)[:, : shape[1]]


def _quantised(source: Tensors, name: str, shape: tuple[int, ...], power_of_two: bool) -> list[Planned]:
    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        tensor = source.tensor(name)
        for part in _rows(shape):
            yield quantise(as_float(tensor[part], np.dtype(np.float32)), power_of_two)

    kind = E8M0 if power_of_two else np.dtype(np.float32)
    return [
        Planned(name, FP8, shape, lambda: (values for values, _ in rows())),
        Planned(name + SCALE, kind, grid(shape), lambda: (scale.astype(kind) for _, scale in rows())),
    ]


def quantise(weight: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """float32 [out, in] -> FP8 values and float32 scales of its blocks: the largest magnitude becomes 448 [§3.3.2].

    With `power_of_two` a scale is rounded up to one, so that dividing by it is exact.
    """
    blocks = grid(weight.shape)
    padded = np.zeros((blocks[0] * FP8_BLOCK, blocks[1] * FP8_BLOCK), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = np.abs(weight)
    largest = padded.reshape(blocks[0], FP8_BLOCK, blocks[1], FP8_BLOCK).max(axis=(1, 3))
    scale = np.maximum(largest, np.float32(SMALLEST_AMAX)) / np.float32(FP8_MAX)
    if power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
    values = weight / per_element(scale, weight.shape)
    return np.clip(values, -FP8_MAX, FP8_MAX).astype(FP8), scale
