"""Measures our training step: tokens per second, time to the first step, memory, and the share of the machine's matmul peak."""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.model.flops import training_flops_per_token
from experiments import _bench_profile

STEPS = {"bench": 3, "mid": 1}  # steps in one timed run, so that a run lasts about as long in either size


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """One optimiser step of uniformly random tokens in unbroken documents: int32 [micro batches, sequences, window + 1]."""
    micro = config.train.n_micro_batches
    shape = (micro, config.train.batch_size // micro, config.data.seq_len + 1)
    tokens = np.random.default_rng(2).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return {"tokens": tokens, "segment_ids": np.ones(shape, np.int32), "domain_ids": np.zeros(shape, np.int32)}


def matmul_runs(dtype: str, size: int = 1024, products: int = 16) -> Iterator[tuple[float, float]]:
    """GFLOP per second and per CPU-second of a chain of `products` dense products of size^3, for ever; one timing each."""

    @jax.jit
    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, y: y @ w, x)

    x, identity = jnp.full((size, size), 0.5, dtype), jnp.eye(size, dtype=dtype)  # the product's values stay bounded
    jax.block_until_ready(chain(x, identity))
    while True:
        start, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(chain(x, identity))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        gflop = products * 2 * size**3 / 1e9
        yield gflop / wall, gflop / cpu


def peak_rss_mb() -> int:
    """This process's largest resident memory so far, in MB (2^20 bytes)."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def measure(size: str, config: Config, *, runs: int, steps: int, profile: bool, started: float) -> Iterator[dict[str, Any]]:
    """Yields the measurement's line and, with `profile`, the profile's.

    `started` is the `time.perf_counter()` at which the program began: `first_call_s` counts imports, initialisation and
    compilation, `compile_s` the compiler alone; `tokens_per_cpu_s` counts the processor time of all threads, which hardly
    moves when other programs run. The matmul peak is measured between the timed runs, and the best counts.
    """
    step = _Step(config)
    first_call = time.perf_counter() - started
    step()  # warm
    steps = steps or STEPS.get(size, 1)
    tokens = config.train.batch_size * config.data.seq_len
    matmuls = {dtype: matmul_runs(dtype) for dtype in ("float32", "bfloat16")}
    peaks: dict[str, list[tuple[float, float]]] = {dtype: [] for dtype in matmuls}
    speeds, speeds_cpu = [], []
    memory = 0
    for _ in range(runs):
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        speeds.append(steps * tokens / (time.perf_counter() - start))
        speeds_cpu.append(steps * tokens / (time.process_time() - cpu))
        memory = memory or peak_rss_mb()
        for dtype, matmul in matmuls.items():
            peaks[dtype].append(next(matmul))
    dtype = config.model.compute_dtype
    speed, speed_cpu = statistics.median(speeds), statistics.median(speeds_cpu)
    peak = {name: max(wall for wall, _ in values) for name, values in peaks.items()}
    peak_cpu = max(per_cpu for _, per_cpu in peaks[dtype])
    flops = training_flops_per_token(config.model, config.data.seq_len)  # a token's
    yield {
        "size": size,
        "what": "train",
        "shape": f"{config.train.batch_size}x{config.data.seq_len} fwd+bwd+AdamW",
        "dtype": dtype,
        "tokens_per_s": round(speed, 1),
        "runs": [round(value, 1) for value in speeds],
        "tokens_per_cpu_s": round(speed_cpu, 1),
        "first_call_s": round(first_call, 2),
        "compile_s": round(step.compile_s, 2),
        "peak_rss_mb": memory,
        "compiled_rss_mb": step.compiled_rss_mb,
        "step_buffers_mb": step.buffers_mb(),
        "matmul_flops_per_step": flops * tokens,
        "gflops": round(speed * flops / 1e9, 1),
        "matmul_peak_gflops": {name: round(value, 1) for name, value in peak.items()},
        "share_of_peak": round(speed * flops / 1e9 / peak[dtype], 3),
        "share_of_peak_per_cpu_s": round(speed_cpu * flops / 1e9 / peak_cpu, 3),
        "loss": round(step.loss, 4),
        "loadavg": round(os.getloadavg()[0], 1),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    if profile:
        shares = _bench_profile.shares(_bench_profile.traced(step), _bench_profile.operations(step.text()))
        yield {
            "size": size,
            "what": "profile",
            "dtype": dtype,
            "method": "share of one traced step's wall time by source file of each operation",
            "share_of_time": {name: round(value, 3) for name, value in shares.items()},
        }


class _Step:
    """The compiled step with its state; calling it runs one step and waits for the loss."""

    def __init__(self, config: Config) -> None:
        from dsv3_jax.training import step

        state = step.init_state(config)
        batch = jax.device_put(random_batch(config))
        train = config.train
        hyper = step.Hyper(*(jnp.float32(v) for v in (train.learning_rate, train.bias_update_speed, train.mtp_loss_weight)))
        jitted: Any = step.make_train_step(config, n_domains=1)
        start = time.perf_counter()
        self._compiled = jitted.lower(state, batch, hyper).compile()
        self.compile_s = time.perf_counter() - start
        self.compiled_rss_mb = peak_rss_mb()  # what imports and the compiler have taken, before anything runs
        self._run: Callable[[Any], Any] = lambda state: self._compiled(state, batch, hyper)
        self._state = state
        self()

    def __call__(self) -> None:
        self._state, metrics = self._run(self._state)
        self.loss = float(metrics["loss"])

    def buffers_mb(self) -> int:
        """What the compiled step allocates for its intermediates, in MB, by the compiler's own account."""
        return self._compiled.memory_analysis().temp_size_in_bytes // 2**20

    def text(self) -> str:
        return self._compiled.as_text()
