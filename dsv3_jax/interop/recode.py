"""A checkpoint's tensors in another dtype, some rows at a time [§3.3.2; released format]: FP8 multiplied out, or made.

A released FP8 weight is value * weight_scale_inv, one scale a block of 128 x 128; embedding, head, norms, the router and
eh_proj are never FP8, and the router's bias is always float32.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.quantize import FP8_BLOCK
from dsv3_jax.interop.check import E8M0, FP8, grid
from dsv3_jax.interop.folder import Tensors
from dsv3_jax.interop.names import IGNORED, SCALE, bias_names, leaves
from dsv3_jax.interop.read import as_float
from dsv3_jax.interop.safetensors import Planned

Target = Literal["keep", "float32", "bfloat16", "fp8"]
FP8_MAX, SMALLEST_AMAX = 448.0, 1e-4
CHUNK = 2**18  # elements that are converted at a time
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
        elif name.endswith(IGNORED) or (target == "fp8" and (dtype == FP8 or is_scale)):
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

    return Planned(name, dtype, shape, pieces, lambda: source.tensor(name))


def _rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """Runs of about CHUNK elements; of rows whole blocks of FP8 where that many fit."""
    per_row = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    step = max(1, CHUNK // per_row)
    step = step // FP8_BLOCK * FP8_BLOCK or step
    yield from (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _cast(source: Tensors, name: str, kind: np.dtype) -> Iterator[np.ndarray]:
    tensor = source.tensor(name)
    scale = source.tensor(name + SCALE).astype(np.float32) if tensor.dtype == FP8 else None
    for rows in _rows(tensor.shape):
        values = as_float(tensor[rows], np.dtype(np.float32))
        if scale is not None:
            of_row = scale[np.arange(rows.start, rows.stop) // FP8_BLOCK]
            values *= np.repeat(of_row, FP8_BLOCK, axis=1)[:, : values.shape[1]]
        yield as_float(values, kind)


def _quantised(source: Tensors, name: str, shape: tuple[int, ...], power_of_two: bool) -> list[Planned]:
    kind = E8M0 if power_of_two else np.dtype(np.float32)

    def scales(tensor: np.ndarray, rows: slice) -> np.ndarray:
        """Of one row of blocks."""
        return np.concatenate([block_scale(_float(tensor[rows, c]), power_of_two) for c in _columns(shape)], axis=1)

    def values() -> Iterator[np.ndarray]:
        tensor = source.tensor(name)
        for rows in _rows_of_blocks(shape):
            scale, out = scales(tensor, rows), np.empty((rows.stop - rows.start, shape[1]), FP8)
            for c in _columns(shape):
                out[:, c] = quantise(_float(tensor[rows, c]), scale[:, c.start // FP8_BLOCK : -(-c.stop // FP8_BLOCK)])
            yield out

    def all_scales() -> Iterator[np.ndarray]:
        tensor = source.tensor(name)
        yield from (scales(tensor, rows).astype(kind) for rows in _rows_of_blocks(shape))

    return [Planned(name, FP8, shape, values), Planned(name + SCALE, kind, grid(shape), all_scales)]


def _float(values: np.ndarray) -> np.ndarray:
    return as_float(values, np.dtype(np.float32))


def _rows_of_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    yield from (slice(start, min(start + FP8_BLOCK, shape[0])) for start in range(0, shape[0], FP8_BLOCK))


def _columns(shape: tuple[int, ...]) -> Iterator[slice]:
    """Runs of whole blocks: of a wide matrix only a few are float32 at a time."""
    step = 8 * FP8_BLOCK
    yield from (slice(start, min(start + step, shape[1])) for start in range(0, shape[1], step))


def block_scale(weight: np.ndarray, power_of_two: bool) -> np.ndarray:
    """float32 [out, in] -> scales of its blocks, by which the largest magnitude of each becomes 448 [§3.3.2].

    With `power_of_two` a scale is rounded up to one, so that dividing by it is exact.
    """
    starts = [np.arange(0, size, FP8_BLOCK) for size in weight.shape]
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(weight), starts[0], axis=0), starts[1], axis=1)
    scale = np.maximum(largest, np.float32(SMALLEST_AMAX)) / np.float32(FP8_MAX)
    return np.exp2(np.ceil(np.log2(scale))).astype(np.float32) if power_of_two else scale


def quantise(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [out, in] and `block_scale` of it -> FP8 values."""
    values = weight / per_element(scale, weight.shape)
    return np.clip(values, -FP8_MAX, FP8_MAX).astype(FP8)


def per_element(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales of blocks as those of the elements of `shape`, whose first element begins a block."""
    return np.repeat(np.repeat(scale, FP8_BLOCK, axis=0)[: shape[0]], FP8_BLOCK, axis=1)[:, : shape[1]]
