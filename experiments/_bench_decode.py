"""Measures our decoding: prompts, steps at batch 1 and 8, how a step grows with the length, and what the memory would allow."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import serving
from dsv3_jax.inference.attention import cache_width
from dsv3_jax.inference.decode import Cache, extend, last_logits, make_cache, padded, prefill, project
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.serving import Serving, error_of
from dsv3_jax.model.module import init_variables
from dsv3_jax.model.transformer import forward, make_context
from dsv3_jax.weights import n_bytes
from experiments._bench_step import peak_rss_mb

PROMPT = 512  # tokens before the first step
STEPS = {"bench": 64, "mid": 32}
PREFILL = 1024
LENGTHS = (128, 512, 1024, 2048, 4088)


def tokens_of(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def model_of(config: ModelConfig, kind: str) -> tuple[Serving, Any, Any]:
    """Random weights laid out for decoding in `kind`; parameters and bias as they were."""
    params, bias = init_variables(config, 0)
    # Routing a little apart, as in a trained model.
    bias = bias + 0.01 * jax.random.normal(jax.random.key(1), bias.shape)
    model = serving.from_params(jax.tree.map(lambda a: a.astype(config.param_dtype), params), bias, config)
    return serving.quantised(model, kind) if kind in ("int8", "int4") else model, params, bias  # type: ignore[arg-type]


class Stepper:
    """`run(n)`: n greedy steps of a batch after a prompt, one compiled program."""

    def __init__(self, model: Serving, config: ModelConfig, batch: int, size: int):
        self.model, self.config, self.cache = model, config, make_cache(config, batch, size)
        self.token = jnp.zeros(batch, jnp.int32)

        def steps(model: Serving, rows: Any, token: Any, start: Any, n: Any) -> Any:
            def one(i: Any, carry: Any) -> Any:
                token, rows = carry
                stream, rows = extend(model, rows, token[:, None], start + i, config, absorbed=True)
                return jnp.argmax(project(model, stream.normed_BTD[:, 0]), -1).astype(jnp.int32), rows

            return jax.lax.fori_loop(0, n, one, (token, rows))

        self._steps = jax.jit(steps, donate_argnums=1)

    def run(self, start: int, n: int) -> float:
        """Seconds of `n` steps from position `start` on."""
        began = time.perf_counter()
        positions = jnp.full(self.token.shape, start, jnp.int32)
        token, rows = self._steps(self.model, self.cache.layers, self.token, positions, jnp.int32(n))
        token.block_until_ready()
        self.cache = Cache(rows)
        return time.perf_counter() - began


def timed(run: Callable[[], float], runs: int) -> list[float]:
    run()
    return [run() for _ in range(runs)]


def read_bandwidth(total_bytes: int, seconds: float = 1.0) -> float:
    """Bytes a second that this machine reads from float32 matrices of `total_bytes` together, over and over: the best of sums
    and products with a vector. What fits a cache stays there, as it does for a model of that size."""
    width = 512
    n = max(1, total_bytes // (4 * width * 1024))
    matrices = [jnp.ones((width, max(16, total_bytes // (4 * width * n))), jnp.float32) for _ in range(n)]
    vector, size = jnp.ones((1, width), jnp.float32), sum(m.nbytes for m in matrices)
    best = 0.0

    def sums(matrices: Any, vector: Any) -> Any:
        return sum(m.sum() for m in matrices)

    def products(matrices: Any, vector: Any) -> Any:
        return sum((vector @ m)[0, 0] for m in matrices)

    for function in (sums, products):
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(matrices, vector))
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            jax.block_until_ready(compiled(matrices, vector))
            best = max(best, size / (time.perf_counter() - began))
    return best


def step_bytes(model: Serving, config: ModelConfig, distinct: float, batch: int, length: float) -> float:
    """What one step must read: every matrix but experts', `distinct` experts in each MoE layer, and the cache."""
    total = float(n_bytes(model.lm_head) + batch * n_bytes(model.embed_tokens) / config.vocab_size)
    for params, bias in model.layers:
        experts = n_bytes(params["mlp"]["experts"]) if bias is not None else 0
        total += n_bytes(params) - experts + experts / config.n_routed_experts * distinct
    row = cache_width(config) * jnp.dtype(config.compute_dtype).itemsize
    return total + config.num_hidden_layers * batch * length * row


def distinct_experts(params: Any, bias: Any, config: ModelConfig, tokens: np.ndarray) -> float:
    """Mean number of different experts that a batch's tokens of one position choose in a layer."""
    if len(tokens) == 1:
        return float(config.num_experts_per_tok)
    context = make_context(jnp.ones(tokens.shape, jnp.int32), config, cross_document=True)
    indices = np.asarray(jax.jit(lambda p, b, t: forward(p, b, t, context, config).layers.indices)(params, bias, tokens))
    return float(np.mean([len(np.unique(layer[:, t])) for layer in indices for t in range(tokens.shape[1])]))


def logit_error(config: ModelConfig, model: Serving, exact: tuple[ModelConfig, Serving]) -> dict[str, float]:
    """Of logits after 64 prompts of 32 tokens, against float32."""
    tokens = tokens_of(config, 64, 32).tolist()
    error = error_of(last_logits(model, config, tokens), last_logits(exact[1], exact[0], tokens))
    return {"logit_error_rms": round(error.rms, 6), "logit_error_max": round(error.largest, 6)}


def measure_prefill(size: str, config: ModelConfig, kind: str, runs: int, started: float) -> Iterator[dict[str, Any]]:
    model, _, _ = model_of(config, kind)
    prompts, cache = padded(tokens_of(config, 1, PREFILL).tolist(), PREFILL), make_cache(config, 1, PREFILL)

    def run() -> float:
        nonlocal cache
        began = time.perf_counter()
        done = prefill(model, cache, prompts, config, chunk=PREFILL)
        jax.block_until_ready(done.hidden_BD)
        cache = done.cache
        return time.perf_counter() - began

    run()
    first, seconds = time.perf_counter() - started, timed(run, runs)
    rates = sorted(PREFILL / s for s in seconds)
    yield {
        "size": size, "what": "prefill", "shape": f"1x{PREFILL}", "dtype": kind,
        "tokens_per_s": round(statistics.median(rates), 1), "runs": [round(r, 1) for r in rates],
        "first_call_s": round(first, 1), "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip


def measure_decode(
    size: str, config: ModelConfig, kind: str, batch: int, runs: int, started: float, exact: Callable[[], Any]
) -> Iterator[dict[str, Any]]:
    model, params, bias = model_of(config, kind)
    steps = STEPS.get(size, 32)
    distinct = distinct_experts(params, bias, config, tokens_of(config, batch, 64))
    del params
    stepper = Stepper(model, config, batch, PROMPT + steps)
    stepper.run(PROMPT, 1)
    first = time.perf_counter() - started
    seconds = timed(lambda: stepper.run(PROMPT, steps), runs)
    rates = sorted(batch * steps / s for s in seconds)
    needed = step_bytes(model, config, distinct, batch, PROMPT + steps / 2)
    bandwidth = read_bandwidth(int(needed))
    rate = statistics.median(rates)
    line = {
        "size": size, "what": f"decode_b{batch}", "shape": f"b{batch} after {PROMPT}", "dtype": kind,
        "tokens_per_s": round(rate, 1), "runs": [round(r, 1) for r in rates], "ms_per_step": round(1e3 * batch / rate, 3),
        "step_mb": round(needed / 1e6, 3), "distinct_experts": round(distinct, 2), "read_gb_per_s": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(needed * rate / batch / bandwidth, 3),
        "model_mb": round(n_bytes(model) / 1e6, 1), "first_call_s": round(first, 1), "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    yield line | (logit_error(config, model, exact()) if kind != "float32" else {})


def measure_growth(size: str, config: ModelConfig, kind: str, runs: int) -> Iterator[dict[str, Any]]:
    """A step's time as the sequence grows, in one program; and what the host adds to a token."""
    model, _, _ = model_of(config, kind)
    stepper = Stepper(model, config, 1, 4096)
    stepper.run(0, 1)
    times = {length: statistics.median(timed(partial(stepper.run, length, 8), runs)) / 8 for length in LENGTHS}
    result = generate(model, config, tokens_of(config, 1, 64).tolist(), max_new_tokens=257)
    again = generate(model, config, tokens_of(config, 1, 64).tolist(), max_new_tokens=257).statistics
    assert result.statistics.new_tokens == again.new_tokens
    rows = cache_width(config) * jnp.dtype(config.compute_dtype).itemsize * config.num_hidden_layers
    yield {
        "size": size, "what": "growth", "dtype": kind,
        "ms_per_step": {str(length): round(1e3 * t, 3) for length, t in times.items()},
        "cache_kb": {str(length): round(length * rows / 1e3, 1) for length in LENGTHS},
        "host_ms_per_token": round(1e3 * again.host_seconds / again.timed_tokens, 4),
        "generate_ms_per_token": round(1e3 * again.decode_seconds / again.timed_tokens, 3),
    }  # fmt: skip
