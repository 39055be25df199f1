"""Kernels on the accelerator that is here, beside XLA's and tokamax's: median times, and how near the chip's peak ours come."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.fp8.quantize import Quantised, Quantiser
from dsv3_jax.kernels.decode.api import decode_attention, paged_decode_attention
from dsv3_jax.kernels.decode.work import splits_for
from dsv3_jax.kernels.grouped.api import grouped_product, grouped_swiglu
from dsv3_jax.kernels.quantise.api import quantise, requantise_transposed, swiglu_quantise
from dsv3_jax.kernels.router.api import choose
from dsv3_jax.kernels.scaled.api import grouped_scaled_outer, grouped_scaled_product, scaled_product
from dsv3_jax.planner.chips import CHIPS
from dsv3_jax.presets import preset
from experiments import _bench, _bench_attention, _bench_tokamax

ROUNDS = 7
LONG_ENOUGH = 0.01  # seconds of one timing: a call alone may take less than to send it


class Sizes(NamedTuple):
    """Of what is measured: V3's, of one expert-parallel rank and of one sequence, with as many heads as fit memory unfused."""

    rows: int = 32768
    hidden: int = 7168
    width: int = 2048
    experts: int = 8
    heads: int = 128
    length: int = 4096
    batch: int = 32
    page: int = 64
    dense: int = 18432


class Run(NamedTuple):
    call: Callable[..., Any]
    operands: tuple[Any, ...]
    chosen: Callable[[jax.stages.Lowered], str] | None = None  # which implementation it turned out to be, if it chooses one


class Case(NamedTuple):
    kernel: str
    shape: str
    ours: Run
    peers: dict[str, Run]  # the first one's results are what ours are compared with
    flops: int  # useful ones
    unread: int = 0  # bytes of operands that no result depends on

    def bytes(self) -> int:
        """Of operands and results, each once."""
        call, operands, _ = self.ours
        moved = [*operands, *jax.tree.leaves(jax.eval_shape(call, *operands))]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moved)) - self.unread


def cases(implementation: str, sizes: Sizes) -> Iterator[Case]:
    """One after the other, so that only one's operands are in memory."""
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def normal(*shape: int, dtype: Any = jnp.bfloat16, size: float = 1.0) -> jax.Array:
        return size * jax.random.normal(next(keys), shape, dtype)

    yield from _grouped(implementation, sizes, normal)
    yield from _scaled(implementation, sizes, normal)
    yield from _attention(implementation, sizes, normal)
    yield from _decode(implementation, sizes, normal)
    yield from _narrow(implementation, sizes, normal)


def _counts(sizes: Sizes) -> jax.Array:
    """Uneven, as a router's choices are; whole tiles, as FP8's weight gradient wants."""
    each = sizes.rows // sizes.experts
    counts = [each + (128 * (i % 3 - 1) if each > 128 else 0) for i in range(sizes.experts)]
    counts[-1] += sizes.rows - sum(counts)
    return jnp.asarray(counts, jnp.int32)


def _grouped(implementation: str, s: Sizes, normal: Any) -> Iterator[Case]:
    count, x = _counts(s), normal(s.rows, s.hidden)
    up, flops = normal(s.experts, s.hidden, s.width, size=s.hidden**-0.5), 2 * s.rows * s.hidden * s.width
    shape = f"{s.rows}x{s.hidden}x{s.width}"

    def product(x: Any, w: Any) -> Any:
        return grouped_product(x, w, count, implementation=implementation)

    def ragged(x: Any, w: Any) -> Any:
        return jax.lax.ragged_dot(x, w, count)

    def tokamax_s(x: Any, w: Any) -> Any:
        return _bench_tokamax.ragged_dot(x, w, count)

    peers = {"ragged_dot": Run(ragged, (x, up))} | _tokamax("ragged_dot", tokamax_s, (x, up))
    yield Case("grouped_up", shape, Run(product, (x, up)), peers, flops)
    back = normal(s.rows, s.width), x, up
    peers = {"ragged_dot": Run(_pull_back(ragged), back)} | _tokamax("ragged_dot", _pull_back(tokamax_s), back)
    yield Case("grouped_up_backward", shape, Run(_pull_back(product), back), peers, 2 * flops)
    down, gates = normal(s.experts, s.width, s.hidden, size=s.width**-0.5), jnp.ones(s.rows)

    def experts(how: str, x: Any, gate: Any, up: Any, down: Any) -> Any:
        return grouped_swiglu(x, gates, gate, up, down, count, implementation=how)

    ours, theirs = (partial(experts, how) for how in (implementation, "xla"))
    weights = up, jnp.flip(up, 0), down
    yield Case("grouped_swiglu", shape, Run(ours, (x, *weights)), {"ragged_dot": Run(theirs, (x, *weights))}, 3 * flops)
    both = [Run(_pull_back(run), (x, x, *weights)) for run in (ours, theirs)]
    yield Case("grouped_swiglu_backward", shape, both[0], {"ragged_dot": both[1]}, 6 * flops)


def _tokamax(name: str, run: Callable[..., Any], operands: tuple[Any, ...]) -> dict[str, Run]:
    """A peer, where it is installed."""
    return {f"tokamax {name}": Run(run, operands, _bench_tokamax.chosen)} if _bench_tokamax.installed() else {}


def _pull_back(run: Callable[..., Any]) -> Callable[..., Any]:
    """The gradients alone: what the forward pass gives that they do not need, XLA drops."""

    def gradients(dy: Any, *operands: Any) -> Any:
        return jax.vjp(run, *operands)[1](dy)

    return gradients


def _scaled(implementation: str, s: Sizes, normal: Any) -> Iterator[Case]:
    """FP8 beside bfloat16, of the same numbers."""
    count, how = _counts(s), {"dtype": jnp.bfloat16, "implementation": implementation}
    row, column, block = (Quantiser(tile=tile) for tile in ((1, 128), (128, 1), (128, 128)))

    def narrow(x: Any, quantiser: Quantiser) -> tuple[Quantised, jax.Array]:
        found = jax.jit(lambda x: quantise(x, quantiser, implementation="reference"))(x)
        return found, found.astype(jnp.bfloat16)

    def up(a: Any, b: Any) -> Any:
        return grouped_scaled_product(a, b, count, **how)

    def outer(a: Any, b: Any) -> Any:
        return grouped_scaled_outer(a, b, count, **how)

    def wide_up(a: Any, b: Any) -> Any:
        return jax.lax.ragged_dot(a, b, count)

    def wide_outer(a: Any, b: Any) -> Any:
        along = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
        return jax.lax.ragged_dot_general(a.T, b, count, along)

    a, b = narrow(normal(s.rows, s.hidden), row), narrow(normal(s.experts, s.hidden, s.width, size=s.hidden**-0.5), block)
    shape, flops = f"{s.rows}x{s.hidden}x{s.width}", 2 * s.rows * s.hidden * s.width
    bf16 = {"ragged_dot in bfloat16": Run(wide_up, (a[1], b[1]))}
    yield Case("fp8_up", shape, Run(up, (a[0], b[0])), bf16, flops)
    a, b = narrow(normal(s.hidden, s.rows), row), narrow(normal(s.rows, s.width), column)
    bf16 = {"ragged_dot in bfloat16": Run(wide_outer, (a[1], b[1]))}
    yield Case("fp8_outer", shape, Run(outer, (a[0], b[0])), bf16, flops)
    a, b = narrow(normal(s.length, s.hidden), row), narrow(normal(s.hidden, s.dense, size=s.hidden**-0.5), block)
    bf16 = {"dot in bfloat16": Run(jnp.dot, (a[1], b[1]))}
    shape, flops = f"{s.length}x{s.hidden}x{s.dense}", 2 * s.length * s.hidden * s.dense
    yield Case("fp8_dense", shape, Run(partial(scaled_product, **how), (a[0], b[0])), bf16, flops)


def _attention(implementation: str, s: Sizes, normal: Any) -> Iterator[Case]:
    heads = [normal(1, s.heads, s.length, width) for width in (128, 64, 128, 128)]
    operands, dy = (*heads[:3], normal(1, s.length, 64), heads[3]), normal(1, s.heads, s.length, 128)
    shape = f"{s.heads}x{s.length}x(128+64,128)"
    ours = partial(_bench_attention.ours, implementation)
    fused = ("cudnn",) if jax.default_backend() == "gpu" else ()
    theirs = {f"dot_product_attention {how}": partial(_dot_product_attention, how) for how in ("xla", *fused)}
    forward = _bench_attention.least_flops(s.length, _bench_attention.FORWARD, s.heads)
    peers = {name: Run(run, operands) for name, run in theirs.items()}
    peers |= _tokamax("dot_product_attention", _tokamax_attention, operands)
    yield Case("attention", shape, Run(ours, operands), peers, forward)
    # With the forward pass, whose statistics the gradients need.
    both = forward + _bench_attention.least_flops(s.length, _bench_attention.BACKWARD, s.heads)
    back = dy, *operands
    peers = {name: Run(_pull_back(run), back) for name, run in theirs.items()}
    peers |= _tokamax("dot_product_attention", _pull_back(_tokamax_attention), back)
    yield Case("attention_and_gradients", shape, Run(_pull_back(ours), back), peers, both)


def _dot_product_attention(how: str, q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any) -> Any:
    """Which has one width: values are padded."""
    queries, keys = _joined(q, q_rope, k, k_rope)
    values = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, keys.shape[-1] - v.shape[-1]))).swapaxes(1, 2)
    named: Any = how
    out = jax.nn.dot_product_attention(
        queries, keys, values, scale=_bench_attention.KEY**-0.5, is_causal=True, implementation=named
    )  # fmt: skip
    return out.swapaxes(1, 2)[..., : v.shape[-1]]


def _tokamax_attention(q: Any, q_rope: Any, k: Any, k_rope: Any, v: Any) -> Any:
    queries, keys = _joined(q, q_rope, k, k_rope)
    scale = _bench_attention.KEY**-0.5
    return _bench_tokamax.dot_product_attention(queries, keys, v.swapaxes(1, 2), scale).swapaxes(1, 2)


def _joined(q: Any, q_rope: Any, k: Any, k_rope: Any) -> tuple[Any, Any]:
    """[B, T, H, C + R]: heads behind positions, parts beside each other, the rotary key each head's."""
    k_rope = jnp.broadcast_to(k_rope[:, None], (*k.shape[:3], k_rope.shape[-1]))
    queries, keys = (jnp.concatenate(pair, axis=-1).swapaxes(1, 2) for pair in ((q, q_rope), (k, k_rope)))
    return queries, keys


def _decode(implementation: str, s: Sizes, normal: Any) -> Iterator[Case]:
    """Sequences of all lengths up to the longest."""
    lengths = jnp.asarray([s.length * (i + 1) // s.batch - i for i in range(s.batch)], jnp.int32)
    q, n_pages = normal(s.batch, 1, s.heads, 576), s.length // s.page
    cache = normal(s.batch, s.length, 576)
    table = jax.random.permutation(jax.random.key(1), s.batch * n_pages).reshape(s.batch, n_pages).astype(jnp.int32)
    pages = normal(s.batch * n_pages, s.page, 576)

    how: dict[str, Any] = {"latent": 512, "scale": 0.1}
    if implementation != "reference":
        how["splits"] = splits_for(implementation, s.batch, s.heads, s.length)  # as the model has it

    def contiguous(name: str, q: Any, cache: Any, lengths: Any) -> Any:
        return decode_attention(q, cache, lengths, **how, implementation=name)

    def paged(name: str, q: Any, pages: Any, table: Any, lengths: Any) -> Any:
        return paged_decode_attention(q, pages, table, lengths, **how, implementation=name)

    flops = 2 * int(lengths.sum()) * s.heads * (576 + 512)
    unread = (s.batch * s.length - int(lengths.sum())) * 576 * 2
    shape = f"{s.batch}x{s.heads}x{s.length}"
    yield _beside_reference("decode", shape, contiguous, implementation, (q, cache, lengths), flops, unread)
    yield _beside_reference("decode_paged", shape, paged, implementation, (q, pages, table, lengths), flops, unread)


def _narrow(implementation: str, s: Sizes, normal: Any) -> Iterator[Case]:
    """What memory limits: the router, and quantisation."""
    x, (g, u) = normal(s.rows, s.hidden), (normal(s.rows, s.width) for _ in range(2))
    config = preset("deepseek_v3_671b").model

    def route(how: str, logits: Any, bias: Any) -> Any:
        return tuple(choose(logits, bias, config, implementation=how))

    def tiles(tile: tuple[int, int], how: str, x: Any) -> Any:
        found = quantise(x, Quantiser(tile=tile), implementation=how)
        return found.values, found.scale

    def swiglu(how: str, g: Any, u: Any) -> Any:
        found = swiglu_quantise(g, u, Quantiser(), implementation=how)
        return found.values, found.scale

    def transposed(how: str, x: Any) -> Any:
        found = requantise_transposed(x, Quantiser(tile=(128, 1)), implementation=how)
        return found.values, found.scale

    logits = normal(s.rows, config.n_routed_experts, dtype=jnp.float32), normal(config.n_routed_experts, dtype=jnp.float32)
    yield _beside_reference("router", f"{s.rows}x{config.n_routed_experts}", route, implementation, logits)
    shape = f"{s.rows}x{s.hidden}"
    for tile in ((1, 128), (128, 1), (128, 128)):
        yield _beside_reference(f"quantise_{tile[0]}x{tile[1]}", shape, partial(tiles, tile), implementation, (x,))
    yield _beside_reference("quantise_swiglu", f"{s.rows}x{s.width}", swiglu, implementation, (g, u))
    narrow = jax.jit(lambda x: quantise(x, Quantiser(), implementation="reference"))(x)
    yield _beside_reference("requantise_transposed", shape, transposed, implementation, (narrow,))


def _beside_reference(
    name: str,
    shape: str,
    run: Callable[..., Any],
    implementation: str,
    operands: tuple[Any, ...],
    flops: int = 0,
    unread: int = 0,
) -> Case:
    ours, reference = (Run(partial(run, how), operands) for how in (implementation, "reference"))
    return Case(name, shape, ours, {"reference": reference}, flops, unread)


def peaks(kind: str) -> tuple[float, float] | None:
    """FLOPs and bytes a second of a device of this kind, where they are known."""
    if kind.startswith("TPU"):
        info = pltpu.get_tpu_info()
        return info.bf16_ops_per_second * info.num_cores, info.mem_bw_bytes_per_second * info.num_cores
    chip = next((chip for name, chip in CHIPS.items() if chip.platform == "gpu" and name.upper() in kind.upper()), None)
    return chip and (1e12 * chip.bf16_tflops, 1e9 * chip.hbm_gbs)


def seconds(compiled: Callable[..., Any], operands: Any, calls: int) -> float:
    """Of one call of several, that are sent without waiting for each other."""
    start = time.perf_counter()
    for _ in range(calls):
        results = compiled(*operands)
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / calls


def difference(ours: Any, theirs: Any) -> float:
    """||ours - theirs|| / ||theirs||, over all results in float32."""

    def norm(trees: list[Any]) -> Any:
        return jnp.sqrt(sum(jnp.sum(jnp.square(v)) for v in trees))

    def of(ours: Any, theirs: Any) -> Any:
        a, b = ([v.astype(jnp.float32) for v in jax.tree.leaves(tree)] for tree in (ours, theirs))
        return norm([x - y for x, y in zip(a, b, strict=True)]) / norm(b)

    return float(jax.jit(of)(ours, theirs))


def measure(case: Case, rounds: int, rates: tuple[float, float] | None) -> Iterator[dict[str, Any]]:
    """A peer a line: times in microseconds, medians of what is run alternately, and of its rounds' ratios; the difference of
    the results; ours' share of the roofline; of a peer that chooses one, its implementation."""
    head = {"kernel": case.kernel, "shape": case.shape}
    try:
        runs = {"": _warm(case.ours)}
    except FAILURES as error:
        yield head | _bench.failure(error)
        return
    for name, peer in case.peers.items():
        try:
            runs[name] = _warm(peer)
        except Exception as error:  # what others raise for a shape that they do not take, their tests of types among it
            yield head | {"peer": name} | _bench.failure(error)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run.compiled, run.operands, run.calls))
    ours = statistics.median(times[""])
    line: dict[str, Any] = {"us": round(1e6 * ours, 1)}
    if case.flops:
        line["tflops"] = round(1e-12 * case.flops / ours, 1)
    moved = case.bytes()
    line["gbs"] = round(1e-9 * moved / ours, 1)
    if rates:
        line["share_of_roofline"] = round(max(case.flops / rates[0], moved / rates[1]) / ours, 3)
    for name, theirs in list(runs.items())[1:]:
        ratio = statistics.median(b / a for a, b in zip(times[""], times[name], strict=True))
        yield (
            head
            | line
            | {
                "peer": name,
                "peer_us": round(1e6 * statistics.median(times[name]), 1),
                "peer_over_ours": round(ratio, 3),
                "difference": float(f"{difference(runs[''].results, theirs.results):.2e}"),
            }
            | ({"peer_implementation": theirs.implementation} if theirs.implementation else {})
        )
    if len(runs) == 1:
        yield head | line


FAILURES = jax.errors.JaxRuntimeError, ValueError, NotImplementedError, RuntimeError


class Warm(NamedTuple):
    """What is timed: compiled, with its operands, and how many calls take long enough."""

    compiled: Callable[..., Any]
    operands: tuple[Any, ...]
    calls: int
    results: Any
    implementation: str  # which it turned out to be, of one that chooses


def _warm(run: Run) -> Warm:
    lowered = jax.jit(run.call).lower(*run.operands)
    compiled = lowered.compile()
    results = jax.block_until_ready(compiled(*run.operands))
    once = min(seconds(compiled, run.operands, 1) for _ in range(2))
    calls = max(1, min(100, round(LONG_ENOUGH / once)))
    return Warm(compiled, run.operands, calls, results, run.chosen(lowered) if run.chosen else "")


def lines(implementation: str, sizes: Sizes, chosen: list[str], rounds: int = ROUNDS) -> Iterator[dict[str, Any]]:
    """A line a kernel and peer, with the device's name; of what fails the error."""
    kind = jax.devices()[0].device_kind
    rates = peaks(kind)
    for case in cases(implementation, sizes):
        if not chosen or case.kernel in chosen:
            yield from ({"device": kind} | line for line in measure(case, rounds, rates))
