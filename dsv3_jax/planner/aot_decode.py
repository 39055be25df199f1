"""One decoding step compiled ahead of time for machines that are not here [§3.4.2]: memory by what it holds, collectives.

Nothing is allocated. The model lies as the `decode` layout of `dsv3_jax.inference.mesh` says: experts, the shared one among
them, over all devices, attention over tensor ranks, a latent cache for the sequences of each group of these.
"""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.inference import deploy
from dsv3_jax.inference.attention import cache_dtype, cache_shape
from dsv3_jax.inference.decode import extend, project
from dsv3_jax.inference.mesh import ServingPlacement, serving_placement
from dsv3_jax.inference.serving import Serving
from dsv3_jax.parallel.mesh import TENSOR
from dsv3_jax.planner.aot import Compiled, collectives, compiled_quickly, kernels, sent
from dsv3_jax.planner.hlo import cost_of
from dsv3_jax.planner.rows import Section, figure
from dsv3_jax.planner.targets import Target, memory_of, require_fits


class Batch(NamedTuple):
    """What is decoded at once."""

    requests: int  # sequences for each device
    context: int  # positions that their caches have room for


def decode_placement(config: Config, target: Target) -> ServingPlacement:
    """Every device of the target in one deployment; `mesh_tensor` and `mesh_data` of the config as given, else the layout's.

    Raises ValueError, one line, if they do not divide the devices.
    """
    parallel = config.parallel
    return serving_placement(
        "decode", config.model, target.devices, tensor=parallel.mesh_tensor, data=parallel.mesh_data or 1, parallel=parallel
    )


def compile_decode(config: Config, target: Target, batch: Batch) -> tuple[Compiled, Serving]:
    """A greedy step for all sequences; and the model that it was compiled for, in shapes.

    Raises ValueError, one line, if the mesh does not divide the model, and if the program does not fit a device's memory.
    """
    placement, model_config = decode_placement(config, target), config.model
    model = deploy.abstract(model_config, placement, jnp.dtype(model_config.compute_dtype))
    n_sequences = batch.requests * len(target.devices)
    along, whole = placement.sharding(PartitionSpec(placement.batch_axes)), placement.sharding(PartitionSpec())
    shape = cache_shape(model_config, n_sequences, batch.context, target.platform)
    rows = tuple(
        jax.ShapeDtypeStruct(
            (stack.n_layers, *shape),
            cache_dtype(model_config, target.platform),
            sharding=placement.sharding(placement.batch_spec),
        )
        for stack in model.layers
    )
    integers: Any = jax.ShapeDtypeStruct((n_sequences,), jnp.int32, sharding=along)

    def step(model: Serving, rows: Any, token_B: Any, position_B: Any) -> Any:
        stream, rows = extend(model, rows, token_B[:, None], position_B, model_config, absorbed=True)
        return jnp.argmax(project(model, stream.normed_BTD[:, 0]), axis=-1).astype(jnp.int32), rows, stream.count_LR

    caches = tuple(row.sharding for row in rows)
    started = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(along, caches, whole))
    compiled = compiled_quickly(lambda: jitted.trace(model, rows, integers, integers), target)
    memory = memory_of(compiled)
    if not target.enforced:
        require_fits(memory, target)
    cost = cost_of(compiled.as_text())
    return Compiled(target, dict(placement.sizes), memory, cost, time.perf_counter() - started), model


def sections(config: Config, compiled: Compiled, model: Serving, batch: Batch) -> tuple[Section, ...]:
    """What a device holds, and every kernel and collective of a step."""
    memory, sizes = compiled.memory, compiled.sizes
    placement = model.layers[-1].placement
    experts = sum(_local_bytes(s.params["mlp"].get("experts")) for s in model.layers)
    attention = sum(_local_bytes(s.params["self_attn"]) for s in model.layers)
    tables = _local_bytes((model.embed_tokens, model.lm_head))
    layers = sum(_local_bytes(s.params) for s in model.layers)
    shape = cache_shape(config.model, batch.requests * sizes[TENSOR], batch.context, compiled.target.platform)
    cache = math.prod(shape) * jnp.dtype(config.model.compute_dtype).itemsize * config.model.num_hidden_layers
    slots = placement.n_slots(config.model)
    rows = [
        figure("devices", "devices", len(compiled.target.devices), "", "input"),
        figure("mesh_data", "  groups with all experts each", sizes["data"], "", "input"),
        figure("mesh_expert", "  expert ranks", sizes["expert"], "", "input"),
        figure("mesh_tensor", "  tensor ranks of attention", sizes[TENSOR], "", "input"),
        figure("slots", "expert slots of a device", slots // placement.expert_ranks),
        figure("copies", "  copies of experts in a layer, all devices", slots - placement.n_experts(config.model)),
        figure("requests", "sequences a device", batch.requests, "", "input"),
        figure("context", "positions of a sequence", batch.context, "", "input"),
        figure("experts", "experts' weights", experts, "B"),
        figure("attention", "attention's weights", attention, "B"),
        figure("tables", "embedding and head", tables, "B"),
        figure("other", "other weights", layers - experts - attention, "B"),
        figure("cache", "latent cache", cache, "B"),
        figure("arguments", "all of these, as XLA lays them out", memory.arguments, "B"),
        figure("temporaries", "XLA's temporaries, fragmentation included", memory.temporaries, "B"),
        figure("peak", "peak of a device", memory.peak, "B"),
        figure("limit", "  memory that a program may have", compiled.target.memory_bytes, "B", "input"),
        figure("peak_share", "  peak of it", memory.peak / compiled.target.memory_bytes, "%"),
        figure("flops", "matrix products of a device, loops over rounds once", compiled.cost.flops, "FLOP"),
        figure("exchange", "sent: experts' exchange", sent(compiled, exchange=True), "B"),
        figure("others", "sent: everything else", sent(compiled, exchange=False), "B"),
        figure("compile_seconds", "compile time", compiled.seconds, "s"),
    ]
    return (
        Section("decode", f"A decoding step for {compiled.target.spec}", tuple(rows)),
        kernels(compiled),
        collectives(compiled),
    )


def _local_bytes(tree: Any) -> int:
    """On one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


ASSUMPTION = (
    "decoding: greedy; a ragged exchange counts a balanced share of its buffers; of attention's branches the longest counts."
)
