"""How fast are the routed experts, and does their cost follow the routed rows rather than the number of experts?

  python -m experiments.bench_experts                                                   # some three minutes on two cores
  python -m experiments.bench_experts --shapes=512x16x4x64x32 --implementations=bucketed,ragged_dot,dense --dtypes=float32

A shape is tokens x experts x experts per token x hidden size x expert width. One JSON line for each shape, dtype,
implementation and load: median milliseconds of forward and of forward plus backward, and the rate of the useful work (6 or
18 * N * K * D * F FLOPs; what an implementation pads, masks or recomputes earns nothing) beside the peak of one square matmul
in the same run. Shapes that differ only in the number of experts are compared: `ratio` lines give the larger number's time over
the smaller's, the median over rounds. Everything of one dtype is timed in turn, round by round, because other programs slow a
shared machine for a while; `cpu_ms` is processor time, which they disturb less. Expected: 256 experts take at most 1.5 times
as long as 8.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dsv3_jax.moe.experts import routed_experts

_SHAPES = flags.DEFINE_list(
    "shapes", ["2048x16x4x256x128", "2048x64x6x512x256", "16384x8x4x256x128", "16384x256x4x256x128"], "What to time."
)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["bucketed"], "bucketed, ragged_dot, dense.")
_LOADS = flags.DEFINE_list("loads", ["random", "skewed", "same"], "random; skewed: popularity 1/rank; same: K experts get all.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each program; the median counts.", lower_bound=1)

Line = dict[str, Any]
PEAK_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Shape:
    tokens: int
    experts: int
    k: int
    hidden: int
    width: int

    @staticmethod
    def parse(text: str) -> "Shape":
        try:
            shape = Shape(*map(int, text.split("x")))
        except (TypeError, ValueError):
            raise ValueError(f"--shapes: expected tokens x experts x k x hidden x width, 64x8x2x32x16, got {text!r}") from None
        if min(dataclasses.astuple(shape)) < 1 or shape.k > shape.experts:
            raise ValueError(f"--shapes: expected positive numbers and k <= experts, got {text!r}")
        return shape

    @property
    def forward_flops(self) -> int:
        return 6 * self.tokens * self.k * self.hidden * self.width


def choose(shape: Shape, load: str) -> np.ndarray:
    """Indices [N, K] under that load: the K largest of log-popularity plus Gumbel noise, which draws without replacement."""
    rank = np.arange(shape.experts)
    if load not in ("random", "skewed", "same"):
        raise ValueError(f"--loads: expected random, skewed or same, got {load!r}")
    log_popularity = {"random": 0 * rank, "skewed": -np.log1p(rank), "same": -1e3 * (rank >= shape.k)}[load]
    noise = np.random.default_rng(0).gumbel(size=(shape.tokens, shape.experts))
    return np.argsort(-(log_popularity + noise), axis=1)[:, : shape.k].astype(np.int32)


def programs(shape: Shape, dtype: str, implementation: str) -> list[Callable]:
    """Jitted forward(indices) and forward_backward(indices), on fixed random parameters."""
    keys = jax.random.split(jax.random.key(0), 4)
    up, down = (shape.experts, shape.hidden, shape.width), (shape.experts, shape.width, shape.hidden)
    sizes = {"gate_proj": up, "up_proj": up, "down_proj": down}
    experts = {
        name: (jax.random.normal(key, size) * size[1] ** -0.5).astype(dtype)
        for key, (name, size) in zip(keys, sizes.items(), strict=False)
    }
    x = jax.random.normal(keys[3], (shape.tokens, shape.hidden)).astype(dtype)
    gates = jnp.full((shape.tokens, shape.k), 1 / shape.k, jnp.float32)

    def forward(x, gates, experts, indices):
        return routed_experts(x, indices, gates, experts, implementation=implementation)

    def backward(x, gates, experts, indices):
        y, transpose = jax.vjp(lambda x, gates, experts: forward(x, gates, experts, indices), x, gates, experts)
        return y, transpose(x)

    return [partial(jax.jit(f), x, gates, experts) for f in (forward, backward)]


def time_ms(program: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds: on the clock, and of all processors together."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(program())
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def measure(shapes: list[Shape], dtype: str) -> None:
    matrix = jnp.ones((PEAK_SIZE, PEAK_SIZE), dtype)
    square = jax.jit(lambda a: jnp.einsum("ij,jk->ik", a, a, preferred_element_type=jnp.float32))
    runs: dict[tuple[Shape, str, str], list[Callable[[], object]]] = {}
    for shape, implementation in itertools.product(shapes, _IMPLEMENTATIONS.value):
        forward, backward = programs(shape, dtype, implementation)
        for load in _LOADS.value:
            indices = jnp.asarray(choose(shape, load))
            runs[shape, implementation, load] = [partial(forward, indices), partial(backward, indices)]
    for program in (lambda: square(matrix), *itertools.chain(*runs.values())):  # untimed: first touches of memory
        time_ms(program)

    times: dict[tuple, list] = {case: [] for case in runs}
    peaks = []
    for _ in range(_ROUNDS.value):
        for case, pair in runs.items():
            peaks.append(2 * PEAK_SIZE**3 / 1e6 / time_ms(lambda: square(matrix))[0])
            times[case].append([time_ms(program) for program in pair])

    for case, rounds in times.items():
        shape, implementation, load = case
        (forward_ms, forward_cpu), (both_ms, both_cpu) = np.median(rounds, axis=0)
        line: Line = {"shape": dataclasses.asdict(shape), "dtype": dtype, "implementation": implementation, "load": load}
        counts = np.bincount(choose(shape, load).ravel(), minlength=shape.experts)
        line["max_over_mean_load"] = float(counts.max() / counts.mean())
        line |= {"forward_ms": forward_ms, "forward_cpu_ms": forward_cpu, "forward_backward_ms": both_ms}
        line |= {"forward_backward_cpu_ms": both_cpu, "forward_gflops": shape.forward_flops / 1e6 / forward_ms}
        line |= {"forward_backward_gflops": 3 * shape.forward_flops / 1e6 / both_ms, "matmul_peak_gflops": max(peaks)}
        line["matmul_median_gflops"] = statistics.median(peaks)
        show(line)
    for few, many in itertools.combinations(sorted(shapes, key=lambda shape: shape.experts), 2):
        if few.experts < many.experts and dataclasses.replace(few, experts=many.experts) == many:
            for implementation, load in itertools.product(_IMPLEMENTATIONS.value, _LOADS.value):
                pairs = np.asarray(times[many, implementation, load]) / np.asarray(times[few, implementation, load])
                (forward, forward_cpu), (both, both_cpu) = np.median(pairs, axis=0)
                line = {"ratio": f"{many.experts} experts over {few.experts}", "rows": many.tokens * many.k, "dtype": dtype}
                line |= {"implementation": implementation, "load": load, "forward": forward, "forward_cpu": forward_cpu}
                show(line | {"forward_backward": both, "forward_backward_cpu": both_cpu})


def show(line: Line) -> None:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()}
    print(json.dumps(rounded), flush=True)


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        for dtype in _DTYPES.value:
            if dtype not in ("float32", "bfloat16"):
                raise ValueError(f"--dtypes: expected float32 or bfloat16, got {dtype!r}")
        shapes = [Shape.parse(text) for text in _SHAPES.value]
        for load in _LOADS.value:
            choose(Shape(1, 1, 1, 1, 1), load)
        for dtype in _DTYPES.value:
            measure(shapes, dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
