"""Measures FP8's parts in one process: products in each fidelity of accumulation, and rounding, packing and unpacking."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.accumulate import Accumulation, product
from dsv3_jax.fp8.formats import E5M6, pack, unpack
from dsv3_jax.fp8.quantize import Quantiser, quantise

FLOAT32 = "float32"
PRODUCTS = {
    FLOAT32: Accumulation(),
    "promoted": Accumulation("promoted"),
    "promoted, apart": Accumulation("promoted", "apart"),
    "tensor_core": Accumulation("tensor_core"),
    "tensor_core, apart": Accumulation("tensor_core", "apart"),
}
ROW, BLOCK = (1, 128), (128, 128)  # tiles of activations and of weights

Program = Callable[[], Any]


def products(shape: tuple[int, int, int], rounds: int) -> Iterator[dict[str, Any]]:
    """M x K x N in the report's tiles: each other fidelity beside float32, which dequantises and multiplies."""
    m, k, n = shape
    x, w = (jax.random.normal(jax.random.key(i), sides) for i, sides in enumerate(((m, k), (k, n))))
    a, b = _compiled(quantise, x, how=Quantiser(tile=ROW))(), _compiled(quantise, w, how=Quantiser(tile=BLOCK))()
    times = _alternated({name: _compiled(product, a, b, how=how) for name, how in PRODUCTS.items()}, rounds)
    for name, how in PRODUCTS.items():
        if name == FLOAT32:
            continue
        pairs = [ours / theirs for ours, theirs in zip(times[name], times[FLOAT32], strict=True)]
        yield {
            "what": "product: ratio to float32",
            "shape": f"[{m}, {k}] x [{k}, {n}]",
            "accumulation": str(how),
            "ratio": _digits(statistics.median(pairs)),
            "ratio_rounds": [_digits(pair) for pair in pairs],
            "ms": _digits(1e3 * statistics.median(times[name])),
            "float32_ms": _digits(1e3 * statistics.median(times[FLOAT32])),
            **_machine(),
        }


def passes(shape: tuple[int, int], rounds: int) -> Iterator[dict[str, Any]]:
    """GB/s of the float32 side, which all but `unpack` read; `negate` reads and writes float32: what memory allows."""
    x = jax.random.normal(jax.random.key(0), shape)
    rows, blocks, wide = Quantiser(tile=ROW), Quantiser(tile=BLOCK), Quantiser(E5M6, ROW)
    programs = {
        "negate": _compiled(jnp.negative, x),
        "quantise e4m3 1x128": _compiled(quantise, x, how=rows),
        "quantise e4m3 128x128": _compiled(quantise, x, how=blocks),
        "quantise e5m6 1x128": _compiled(quantise, x, how=wide),
    }
    for how in (rows, wide):
        values = _compiled(quantise, x, how=how)().values
        packed = _compiled(pack, values, form=how.form)()
        programs |= {
            f"pack {how.form.name}": _compiled(pack, values, form=how.form),
            f"unpack {how.form.name}": _compiled(unpack, packed, form=how.form, size=shape[-1]),
            f"quantise and pack {how.form.name} 1x128": _compiled(lambda x, how: quantise(x, how).packed(), x, how=how),
        }
    for name, seconds in _alternated(programs, rounds).items():
        speeds = [x.nbytes / 1e9 / second for second in seconds]
        yield {
            "what": name,
            "shape": f"[{shape[0]}, {shape[1]}]",
            "gb_per_s": _digits(statistics.median(speeds)),
            "rounds": [_digits(speed) for speed in speeds],
            "counted": f"float32 {'written' if name.startswith('unpack') else 'read'}",
            **_machine(),
        }


def _compiled(function: Callable[..., Any], *arrays: Any, **fixed: Any) -> Program:
    return partial(jax.jit(partial(function, **fixed)), *arrays)


def _alternated(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round; what else the machine does in a round falls on all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():  # untimed: compilation, first touches of memory
        jax.block_until_ready(program())
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(time.perf_counter() - start)
    return times


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _machine() -> dict[str, Any]:
    return {"loadavg": round(os.getloadavg()[0], 1), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
