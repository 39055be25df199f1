"""What does a training step send on each layout, against the formula, and how long is it on 1, 2, 4 and 8 simulated devices?

    python -m experiments.bench_parallel [--preset=tiny] [--devices=1,2,4,8] [--runs=5] [--set=name=value]

Some four minutes on two cores. One JSON object a line: for each layout the bytes that the compiled program sends a device and
step, by collective and axis, beside the planner's; for each number of devices the median time of a step, for the record only,
since simulated devices share the cores; and what node-limited routing saves, on the router of DeepSeek-V3's size.
"""

import json
import os
import statistics
import time
from collections import Counter
from typing import Any

from absl import flags

from dsv3_jax.config import Config
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import override, parse_settings
from experiments import _cli

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP": {"layout": "report", "mesh_expert": 1},
    "EP": {"layout": "report"},
    "DP 2 x EP": {"layout": "report", "mesh_data": 2},
    "EP x TP 2": {"layout": "tensor_expert", "mesh_tensor": 2},
    "FSDP": {"layout": "fully_sharded"},
    "FSDP 2 x EP": {"layout": "fully_sharded", "mesh_data": 2, "mesh_expert": None},
}


def compiled_on(config: Config, devices: int) -> tuple[Any, Any, Any, Any]:
    """(compiled step, placement, its state, its batch) on the first so many devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.parallel.collectives import Placement
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training.step import Hyper, init_state, make_train_step, state_shardings

    mesh = make_mesh(config, jax.devices()[:devices])
    placement = Placement(mesh, config.parallel) if mesh.size > 1 else None
    shape = (config.train.n_micro_batches, config.train.batch_size // config.train.n_micro_batches, config.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    batch: Any = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "domain_ids": np.zeros_like(tokens)}
    state = init_state(config)
    if placement is not None:
        state = jax.device_put(state, state_shardings(config, placement))
        batch = jax.device_put(batch, placement.sharding(placement.batch_spec))
    step: Any = make_train_step(config, 1, placement)
    hyper = Hyper(*(jnp.float32(value) for value in (1e-3, 1e-3, 0.3)))
    return step.lower(state, batch, hyper).compile(), placement, state, (batch, hyper)


def bytes_sent(config: Config, devices: int, name: str) -> dict[str, Any]:
    """The compiled program's collectives beside the planner's formula, which counts the exchange's buffers as full."""
    from dsv3_jax.planner import aot, wire
    from dsv3_jax.planner.chips import chip_named
    from dsv3_jax.planner.hlo import axes_of, cost_of
    from dsv3_jax.planner.share import make_share

    compiled, placement, _, _ = compiled_on(config, devices)
    share, cost = make_share(config, devices), cost_of(compiled.as_text())
    measured: Counter[str] = Counter()
    sent: Counter[bool] = Counter()
    for found in cost.collectives:
        size = aot.on_the_wire(found) * found.times
        measured[f"{found.kind} {found.dtype} over {'x'.join(axes_of(found.groups, placement.sizes)) or 'none'}"] += int(size)
        sent[found.kind in aot.EXCHANGES] += int(size)
    planned: Counter[bool] = Counter()
    for t in wire.traffic(share, chip_named("h800")):
        is_exchange = t.what in ("dispatch", "combine")
        planned[is_exchange] += int(t.bytes * (share.received_rows / share.rows if is_exchange else 1))
    return {
        "bench": "parallel_bytes", "layout": name, "devices": devices, "axes": dict(placement.sizes),
        "sent": dict(measured), "exchange": sent[True], "exchange_formula": planned[True],
        "others": sent[False], "others_formula": planned[False],
        "largest_result": max(found.result_bytes for found in cost.collectives),
    }  # fmt: skip


def step_time(config: Config, devices: int, runs: int) -> dict[str, Any]:
    import jax

    compiled, placement, state, rest = compiled_on(config, devices)
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        state, metrics = compiled(state, *rest)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    axes = dict(placement.sizes) if placement else {}
    return {"bench": "parallel_step", "devices": devices, "axes": axes, "seconds": round(statistics.median(seconds[1:]), 4)}


def routing_traffic(limit: int, tokens: int = 8192) -> dict[str, Any]:
    """Of DeepSeek-V3's router, 64 expert ranks on 8 nodes, random tokens and weights, with `limit` of 8 groups kept."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.moe.router import route
    from dsv3_jax.parallel.traffic import summary, visits

    model = override(preset("deepseek_v3_671b"), {"topk_group": limit}).model
    rng, channels = np.random.default_rng(0), 64  # enough for 256 scores that are as good as independent
    x = jnp.asarray(rng.standard_normal((tokens, channels)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((channels, model.n_routed_experts)) * channels**-0.5, jnp.float32)
    bias = jnp.zeros(model.n_routed_experts, jnp.float32)
    indices = np.asarray(jax.jit(lambda x, w: route(x, w, bias, model).indices)(x, weight))
    visited = visits(indices, np.arange(tokens) % 64, model.n_routed_experts, 64, 8)
    return {"bench": "routing_traffic", "topk_group": limit, **summary(visited, model.hidden_size)}


def main() -> int:
    config = override(preset(flags.FLAGS.preset), parse_settings(flags.FLAGS.set))
    try:
        devices = [int(n) for n in flags.FLAGS.devices.split(",")]
    except ValueError:
        raise ValueError(f"--devices: expected numbers like 1,2,4,8, got {flags.FLAGS.devices!r}") from None
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(devices)}"
    for limit in (8, 4):
        print(json.dumps(routing_traffic(limit)), flush=True)
    for name, settings in LAYOUTS.items():
        if max(devices) >= 4:
            print(json.dumps(bytes_sent(override(config, _resolved(settings, max(devices))), max(devices), name)), flush=True)
    for n in devices:
        layout = {"layout": "report"} if n > 1 else {}
        print(json.dumps(step_time(override(config, layout), n, flags.FLAGS.runs)), flush=True)
    return 0


def _resolved(settings: dict[str, Any], devices: int) -> dict[str, Any]:
    """An expert axis of None takes what the data axis leaves."""
    left = devices // settings.get("mesh_data", 1)
    return {name: left if value is None else value for name, value in settings.items()}


if __name__ == "__main__":
    flags.DEFINE_string("preset", "tiny", f"one of {', '.join(PRESETS)}")
    flags.DEFINE_multi_string("set", [], "name=value; any field of dsv3_jax/config.py, may be given several times")
    flags.DEFINE_string("devices", "1,2,4,8", "numbers of simulated devices to time a step on")
    flags.DEFINE_integer("runs", 5, "timed steps of each")
    _cli.run(main)
