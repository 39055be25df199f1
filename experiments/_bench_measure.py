"""Kernels on the accelerator that is here, beside XLA's own: median times of pairs, and how near the chip's peak ours come."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.fp8.quantize import Quantiser
from dsv3_jax.kernels.decode.api import decode_attention
from dsv3_jax.kernels.grouped.api import grouped_product
from dsv3_jax.kernels.quantise.api import quantise
from dsv3_jax.kernels.router.api import choose
from dsv3_jax.planner.chips import CHIPS
from dsv3_jax.presets import preset
from experiments import _bench, _bench_attention

PAIRS = 7


class Sizes(NamedTuple):
    """Of what is measured: V3's, of one expert-parallel rank and of one sequence, with as many heads as fit memory unfused."""

    rows: int = 32768
    hidden: int = 7168
    width: int = 2048
    experts: int = 8
    heads: int = 128
    length: int = 4096
    batch: int = 32


class Case(NamedTuple):
    kernel: str
    peer: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    operands: tuple[jax.Array, ...]
    flops: int  # useful ones
    bytes: int  # of operands and results, each once


def cases(implementation: str, sizes: Sizes) -> Iterator[Case]:
    """One after the other, so that only one's operands are in memory."""
    s, keys = sizes, iter(jax.random.split(jax.random.key(0), 32))

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    def case(kernel: str, peer: str, ours: Any, theirs: Any, operands: tuple[jax.Array, ...], flops: int) -> Case:
        results = jax.eval_shape(ours, *operands)
        moved = sum(x.size * x.dtype.itemsize for x in [*operands, *jax.tree.leaves(results)])
        return Case(kernel, peer, ours, theirs, operands, flops, moved)

    def both(run: Callable[..., Any]) -> tuple[str, Any, Any]:
        return "reference", partial(run, implementation), partial(run, "reference")

    count = jnp.full((s.experts,), s.rows // s.experts, jnp.int32)
    yield case(
        "grouped_up", "ragged_dot", partial(grouped_product, implementation=implementation), jax.lax.ragged_dot,
        (normal(s.rows, s.hidden), normal(s.experts, s.hidden, s.width), count), 2 * s.rows * s.hidden * s.width,
    )  # fmt: skip
    heads = [normal(1, s.heads, s.length, width) for width in (128, 64, 128, 128)]
    operands = (*heads[:3], normal(1, s.length, 64), heads[3])
    for kernel, of_pair, of in (
        ("attention", _bench_attention.FORWARD, lambda run: run),
        ("attention_backward", _bench_attention.FORWARD + _bench_attention.BACKWARD, _and_gradients),
    ):
        flops = _bench_attention.least_flops(s.length, of_pair, s.heads)
        ours = of(partial(_bench_attention.ours, implementation))
        yield case(kernel, "dot_product_attention", ours, of(_dot_product_attention), operands, flops)
    q, cache = normal(s.batch, 1, s.heads, 576), normal(s.batch, s.length, 640)
    lengths = jnp.full((s.batch,), s.length, jnp.int32)
    flops = 2 * s.batch * s.heads * s.length * (576 + 512)
    yield case("decode", *both(_decode), (q, cache, lengths), flops)
    x = normal(s.rows, s.hidden)
    for tile in ((1, 128), (128, 128)):
        yield case(f"quantise_{tile[0]}x{tile[1]}", *both(partial(_quantise, tile)), (x,), 0)
    yield case("router", *both(_route), (normal(s.rows, 256, dtype=jnp.float32), normal(256, dtype=jnp.float32)), 0)


def _and_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    def both(*operands: Any) -> Any:
        return jax.vjp(run, *operands)[1](operands[4])

    return both


def _dot_product_attention(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any) -> Any:
    """Which has heads behind positions and one width: parts are joined, the rotary key is each head's, values are padded."""
    k_rope = jnp.broadcast_to(k_rope[:, None], (*k.shape[:3], k_rope.shape[-1]))
    queries, keys = (jnp.concatenate(pair, axis=-1).swapaxes(1, 2) for pair in ((q, q_rope), (k, k_rope)))
    values = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, keys.shape[-1] - v.shape[-1]))).swapaxes(1, 2)
    out = jax.nn.dot_product_attention(queries, keys, values, scale=_bench_attention.KEY**-0.5, is_causal=True)
    return out.swapaxes(1, 2)[..., : v.shape[-1]]


def _decode(implementation: str, q: Any, cache: Any, lengths: Any) -> Any:
    return decode_attention(q, cache, lengths, latent=512, scale=0.1, implementation=implementation)


def _quantise(tile: tuple[int, int], implementation: str, x: Any) -> Any:
    found = quantise(x, Quantiser(tile=tile), implementation=implementation)
    return found.values, found.scale


def _route(implementation: str, logits: Any, bias: Any) -> Any:
    return tuple(choose(logits, bias, preset("deepseek_v3_671b").model, implementation=implementation))


def peaks(kind: str) -> tuple[float, float] | None:
    """FLOPs and bytes a second of a device of this kind, where they are known."""
    if kind.startswith("TPU"):
        info = pltpu.get_tpu_info()
        return info.bf16_ops_per_second * info.num_cores, info.mem_bw_bytes_per_second * info.num_cores
    chip = next((chip for name, chip in CHIPS.items() if chip.platform == "gpu" and name.upper() in kind.upper()), None)
    return chip and (1e12 * chip.bf16_tflops, 1e9 * chip.hbm_gbs)


def measure(case: Case, pairs: int, rates: tuple[float, float] | None) -> dict[str, Any]:
    """Both, alternately: medians in microseconds, the median of the pairs' ratios, and the share of the roofline."""
    runs = [jax.jit(run) for run in (case.ours, case.theirs)]
    for run in runs:
        jax.block_until_ready(run(*case.operands))
    times: list[list[float]] = [[], []]
    for _ in range(pairs):
        for each, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(*case.operands))
            each.append(time.perf_counter() - start)
    ours, theirs = (statistics.median(each) for each in times)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    line = {"kernel": case.kernel, "us": round(1e6 * ours, 1), "peer": case.peer, "peer_us": round(1e6 * theirs, 1)}
    share = max(case.flops / rates[0], case.bytes / rates[1]) / ours if rates else None
    return line | {"peer_over_ours": round(ratio, 3), "share_of_roofline": share and round(share, 3)}


def lines(implementation: str, sizes: Sizes, chosen: list[str], pairs: int = PAIRS) -> Iterator[dict[str, Any]]:
    """A kernel a line, with the device's name; of one that fails the error."""
    kind = jax.devices()[0].device_kind
    rates = peaks(kind)
    for case in cases(implementation, sizes):
        if not chosen or case.kernel in chosen:
            try:
                yield {"device": kind} | measure(case, pairs, rates)
            except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
                yield {"device": kind, "kernel": case.kernel} | _bench.failure(error)
